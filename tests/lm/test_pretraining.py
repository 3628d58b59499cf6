"""Pre-training decoders and encoder-decoders on 1 and 2 ranks under every ZeRO stage is one plain PyTorch process.

The oracle shares with the package which sequences make up a step, and where spans are taken out; it reads every
document by itself, without packing; model, loss, optimizer, clipping and schedule are plain transformers and PyTorch.
"""

from __future__ import annotations

import inspect
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from language_models import CAUSAL, FAMILIES, save_tiny, short_texts, tiny, tokenizer_of
from plain import LOSS_TOLERANCE, WEIGHT_TOLERANCE, plain_training
from processes import STAGE_3, finish, outcome, scalars, start
from torch import nn
from torch.nn import functional as F
from worlds import WORDS, make_base

from recyclable.models.language import language_model
from recyclable.recipes.pretrain_settings import read_pretrain_settings
from recyclable.recipes.pretrain_text import OLD, Text, read_text
from recyclable.weights import lineage
from recyclable.weights.base import Base
from recyclable.weights.sources import fill
from recyclable.weights.vocabulary import load_tokenizer

STEPS, WARMUP, BATCH, LENGTH, SEED, RATE = 6, 2, 8, 24, 7, 5e-3
HEAD_STEPS, HEAD_RATE = 3, 5e-3
ALPHA, BETA, TEMPERATURE, SHARE = 0.6, 3.0, 2.0, 0.3
ALL = (0, 1, 2, 3)
COMMON = {
    **{"max_steps": STEPS, "warmup_steps": WARMUP, "train_batch_size": BATCH, "max_length": LENGTH, "seed": SEED},
    **{"learning_rate": RATE, "weight_decay": 0.1, "adam_beta1": 0.9, "adam_beta2": 0.99, "adam_epsilon": 1e-6},
    **{"max_grad_norm": 0.5, "dropout": 0.0, "eval_every": STEPS, "eval_batch_size": 5, "save_every": 0},
    "log_every": 1,
}
TAUGHT = {"alpha": ALPHA, "beta": BETA, "temperature": TEMPERATURE}
# name -> family, settings, ZeRO stages on 1 and on 2 ranks
PLAN: dict[str, tuple[str, dict[str, Any], tuple[int, ...], tuple[int, ...]]] = {
    "gpt2": ("gpt2", {}, ALL, ALL),
    "llama": ("llama untied", {}, ALL, ALL),
    "qwen3": ("qwen3", {}, ALL, ALL),
    "gemma3": ("gemma3", {}, ALL, ALL),
    "gemma2": ("gemma2", {"attn_implementation": "eager"}, (2,), (3,)),
    "gpt_neox": ("gpt_neox", {}, (1,), ()),
    "mistral": ("mistral", {}, (), (3,)),
    "qwen2": ("qwen2", {}, (), (3,)),
    "opt": ("opt", {}, (), (3,)),
    "t5": ("t5", {}, ALL, ALL),
    "bart": ("bart", {"attention": "full"}, (0,), (3,)),
    "gpt2_full": ("gpt2", {"attention": "full"}, (), (3,)),
    "llama_replay": ("llama untied", {"replay": True}, (0,), (2, 3)),
    "llama_taught": ("llama untied", {"teacher": True, **TAUGHT}, (0,), (1, 3)),
    "t5_taught": ("t5", {"teacher": True, **TAUGHT}, (), (3,)),
    "llama_fresh_head": ("llama untied", {"lm_head_steps": HEAD_STEPS, "lm_head_learning_rate": HEAD_RATE}, (), (2, 3)),
    "bert_apart": ("bert", {"lm": "masked", "attention": "documents"}, (0,), (3,)),
    "t5_hollow": ("t5", {"corpus": "hollow", "train_batch_size": 2}, (), (1, 3)),
}
RUNS = [
    (name, ranks, stage) for name, (*_, one, two) in PLAN.items() for ranks, at in ((1, one), (2, two)) for stage in at
]


@dataclass(frozen=True)
class World:
    """Where the small world of this file lies."""

    folder: Path

    def out(self, name: str, ranks: int, stage: int) -> Path:
        return self.folder / f"{name}-{ranks}-{stage}"

    def base(self, name: str) -> Path:
        return self.folder / "bases" / ("headless" if name.endswith("fresh_head") else PLAN[name][0].replace(" ", "_"))

    def config(self, name: str, ranks: int, stage: int) -> dict[str, Any]:
        changed = dict(PLAN[name][1])
        if changed.pop("replay", None):
            changed["replay"] = {"corpus": str(self.folder / "old.txt"), "share": SHARE}
        if changed.pop("teacher", None):
            changed["teacher"] = str(self.folder / "bases" / f"{self.base(name).name}_teacher")
        corpus = self.folder / f"{changed.pop('corpus', 'new')}.txt"
        out = self.out(name, ranks, stage)
        return {**COMMON, "base": str(self.base(name)), "corpus": str(corpus), "out": out, **changed}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    world = World(tmp_path_factory.mktemp("pretraining"))
    for family in dict.fromkeys(family for family, *_ in PLAN.values() if family != "bert"):
        save_tiny(family, world.folder / "bases" / family.replace(" ", "_"))
    for family in ("llama untied", "t5"):
        save_tiny(family, world.folder / "bases" / f"{family.replace(' ', '_')}_teacher", seed=1)
    make_base(world.folder / "bases" / "bert")
    headless = world.folder / "bases" / "headless"
    tiny("llama untied").model.save_pretrained(headless)
    tokenizer_of(CAUSAL).save_pretrained(headless)
    short_texts(world.folder / "new.txt", documents=250)
    short_texts(world.folder / "old.txt", documents=150, first=30, seed=6)
    hollow(world.folder / "hollow.txt")
    return world


def hollow(file: Path) -> None:
    """Stretches of documents of one word, from which no span is taken out, between others."""
    draw, lines = random.Random(8), []
    for _ in range(40):
        lines += [draw.choice(WORDS) for _ in range(30)]
        lines += [" ".join(draw.choices(WORDS, k=11)) for _ in range(3)]
    file.write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="module")
def trained(world: World) -> World:
    """The world after all runs: in one process without a launcher, and on two ranks under it."""
    for ranks in (1, 2):
        runs = []
        for name, _, stage in (which for which in RUNS if which[1] == ranks):
            config = world.config(name, ranks, stage)
            zero = {"stage": stage, **(STAGE_3 if stage == 3 else {})}
            micro = config["train_batch_size"] // ranks // (2 if stage == 1 and config["train_batch_size"] > 2 else 1)
            ds_config = {"train_micro_batch_size_per_gpu": micro, "zero_optimization": zero}
            runs.append({"verb": "pretrain", "config": config, "ds_config": ds_config})
        folder = world.folder / f"ranks-{ranks}"
        finish(start(folder, runs, nproc=ranks if ranks > 1 else None), folder, timeout_s=900)
    return world


# ---- the oracle --------------------------------------------------------------------------------------------------


class Told(NamedTuple):
    """What a model says where it predicts."""

    logits: torch.Tensor
    """[M, V]"""
    states: torch.Tensor
    """[M, N, H]"""
    rows: torch.Tensor
    """[M]"""


def told(model: nn.Module, batch: dict[str, torch.Tensor]) -> Told:
    """Each document read by itself."""
    side = "decoder_" if "decoder_input_ids" in batch else ""
    read = batch.get("documents", torch.where(batch["attention_mask"] > 0, 0, -1))
    documents = batch.get(f"{side}documents", torch.where(batch[f"{side}attention_mask"] > 0, 0, -1))
    cache = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    logits, states = {}, {}
    for row in range(len(read)):
        for document in documents[row][documents[row] >= 0].unique():
            inputs = {"input_ids": batch["input_ids"][row][read[row] == document][None]}
            if side:
                inputs["decoder_input_ids"] = batch["decoder_input_ids"][row][documents[row] == document][None]
            answer = model(**inputs, **cache, output_hidden_states=True)
            layers = torch.stack(answer.decoder_hidden_states[:-1] if side else answer.hidden_states[:-1])[:, 0]
            for place, at in enumerate((documents[row] == document).nonzero()[:, 0].tolist()):
                flat = row * documents.shape[1] + at
                logits[flat], states[flat] = answer.logits[0, place], layers[:, place]
    places = batch["positions"].tolist()
    if not places:
        return Told(torch.zeros(0, model.config.vocab_size), torch.zeros(0, 1, 1), torch.zeros(0, dtype=torch.long))
    rows = batch["positions"] // documents.shape[1]
    return Told(torch.stack([logits[at] for at in places]), torch.stack([states[at] for at in places]), rows)


def mean_loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    logits = told(model, batch).logits
    nothing = sum((0.0 * parameter).sum() for parameter in model.parameters())  # gradients of 0, where none is told
    return nothing + F.cross_entropy(logits, batch["targets"], reduction="sum") / max(len(logits), 1)


def taught_loss(model: nn.Module, teacher: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    student, wise = told(model, batch), told(teacher, batch)
    hard = F.cross_entropy(student.logits, batch["targets"])
    p, q = (one.logits.div(TEMPERATURE).softmax(-1) for one in (wise, student))
    soft = (p * (p / q).log()).sum() / len(p)
    each = 0.5 * (student.states - wise.states).pow(2).mean((1, 2))
    patient = torch.stack([each[student.rows == row].mean() for row in student.rows.unique()]).mean()
    return (1 - ALPHA) * hard + ALPHA * TEMPERATURE**2 * soft + BETA * patient


@dataclass(frozen=True)
class Expected:
    """What the oracle computed."""

    losses: list[float]
    model: nn.Module
    heldout: dict[str, list[float]]
    """Of new and of old text: before and after."""
    text: Text


def oracle_of(world: World, name: str) -> Expected:
    kind = read_pretrain_settings(world.config(name, 1, 0), "run.yaml")
    base, auto = Base(world.base(name)), FAMILIES[PLAN[name][0]][0]
    text = read_text(kind, base, load_tokenizer(base.folder))
    model = auto.from_pretrained(base.folder, attn_implementation="eager")

    def batch(step: int) -> dict[str, torch.Tensor]:
        return text.training.batch(text.order.step(step))

    def train(names: list[str], loss_of: Callable[[int], torch.Tensor], rate: float, warmup: int, steps: int):
        settings = {"DECAY": 0.1, "CLIP": 0.5, "BETAS": (0.9, 0.99), "EPSILON": 1e-6}
        with pytest.MonkeyPatch.context() as patch:
            for setting, value in settings.items():
                patch.setattr(f"plain.{setting}", value)
            return plain_training(model, names, loss_of, rate, warmup, steps)

    if name.endswith("fresh_head"):
        drawn, fresh = language_model(base, "CausalLM", SEED, None)
        assert fresh == ["lm_head.weight"]
        model.load_state_dict(fill(drawn).state_dict())
        train(fresh, lambda step: mean_loss(model, batch(step)), HEAD_RATE, 0, HEAD_STEPS)
    teacher = kind.teacher and auto.from_pretrained(kind.teacher).requires_grad_(False).eval()

    def heldout() -> dict[str, float]:
        held_out = {}
        for which, examples in text.heldout.items():
            items = [(2**31, row) for row in range(len(examples))]  # masks and spans of held-out text
            with torch.no_grad():
                held_out[which] = mean_loss(model, examples.batch(items)).item()
        return held_out

    def loss_of(step: int) -> torch.Tensor:
        return taught_loss(model, teacher, batch(step)) if teacher else mean_loss(model, batch(step))

    names, model = [name for name, _ in model.named_parameters()], model.eval()
    before = heldout()
    losses = train(names, loss_of, RATE, WARMUP, STEPS)
    after = heldout()
    return Expected(losses, model, {which: [before[which], after[which]] for which in before}, text)


@pytest.fixture(scope="module")
def oracle(world: World) -> Callable[[str], Expected]:
    known: dict[str, Expected] = {}

    def expected(name: str) -> Expected:
        if name not in known:
            known[name] = oracle_of(world, name)
        return known[name]

    return expected


# ---- the claims --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "ranks", "stage"), RUNS)
def test_losses_weights_and_scores_are_those_of_documents_read_one_by_one(
    trained, oracle, record_property, name, ranks, stage
):
    expected, out = oracle(name), trained.out(name, ranks, stage)
    assert outcome(out) == {}
    found = scalars(out, "train/loss")
    worst = max(abs(f - e) / max(abs(e), 1e-3) for f, e in zip(found, expected.losses, strict=True))
    record_property("largest relative difference of losses", worst)
    assert worst <= LOSS_TOLERANCE
    saved = type(expected.model).from_pretrained(out)  # by plain transformers
    wanted, got = dict(expected.model.named_parameters()), dict(saved.named_parameters())
    assert wanted.keys() == got.keys()
    for parameter, value in wanted.items():
        assert torch.allclose(got[parameter], value, rtol=0, atol=WEIGHT_TOLERANCE), parameter
    record = lineage.read_lineage(out)
    for key, which in (("heldout", ""), ("heldout_replay", OLD)):
        if which not in expected.heldout:
            assert key not in record
            continue
        losses = [record[key][when]["loss"] for when in ("before", "after")]
        assert losses == pytest.approx(expected.heldout[which], rel=LOSS_TOLERANCE)
        assert record[key]["after"]["perplexity"] == pytest.approx(np.exp(losses[1]))


@pytest.mark.parametrize("name", [name for name in PLAN if name != "t5_hollow"])
def test_the_comparison_would_notice_training_that_differs(oracle, name):
    losses = oracle(name).losses
    assert np.mean(losses[-3:]) < 0.98 * np.mean(losses[:3])


def test_sequences_hold_several_documents_and_full_attention_differs(oracle):
    batch = oracle("gpt2").text.training.batch([(0, row) for row in range(20)])
    assert (batch["documents"].amax(1) >= 1).all() and batch["documents"].amax() >= 3
    assert oracle("gpt2").losses[0] != pytest.approx(oracle("gpt2_full").losses[0], rel=1e-3)


def test_a_rank_and_a_whole_step_without_a_predicted_token_are_among_the_hollow_steps(oracle):
    text = oracle("t5_hollow").text
    counts = [[len(text.training.batch([item])["targets"]) for item in text.order.step(step)] for step in range(STEPS)]
    assert any(0 in step and sum(step) > 0 for step in counts)


def test_what_a_child_needs_elsewhere_lies_beside_it(trained):
    for name in ("gpt2", "t5"):
        out = trained.out(name, 2, 3)
        assert {"config.json", "generation_config.json", "tokenizer.json", "model.safetensors"} <= {
            file.name for file in out.iterdir()
        }
        parent = json.loads((trained.base(name) / "generation_config.json").read_text())
        assert json.loads((out / "generation_config.json").read_text()) == parent


def test_old_text_is_told_of_in_history_and_lineage(trained):
    out = trained.out("llama_replay", 2, 3)
    record = lineage.read_lineage(out)
    assert record["replay"]["share"] == SHARE and record["replay"]["corpus"]["train"] == str(trained.folder / "old.txt")
    assert len(record["replay"]["corpus"]["digest"]) == 64 != record["corpus"]["digest"]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    told_of = EventAccumulator(str(out / "tensorboard")).Reload()
    last = told_of.Scalars("eval/replay_loss")[-1]
    assert (last.step, last.value) == (STEPS, pytest.approx(record["heldout_replay"]["after"]["loss"]))
