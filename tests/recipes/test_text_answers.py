"""Tasks answered in text are recycled by every method as plain PyTorch would, on any number of ranks, at any stage."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from answers import make_answers_task
from decoders import END, PAD, make_decoder
from plain import ALPHA, BATCH, COMMON, LOSS_TOLERANCE, SEED, SHARE, TEMPERATURE, plain_training
from processes import STAGE_3, finish, outcome, scalars, start
from safetensors.torch import load_file, save_file
from torch import nn
from torch.func import functional_call
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer
from worlds import WORDS, make_upgraded

from recyclable.data.order import Order
from recyclable.recipes.importing import import_weights
from recyclable.recipes.tuned_elsewhere import NOTHING

FAMILIES = ("gpt2", "llama", "qwen3", "gemma3_text", "t5")
STEPS, WARMUP, RATE, BETA, POINTS = 4, 2, 2e-3, 0.5, (0.4,)
DISTILLED = {"alpha": ALPHA, "beta": BETA, "temperature": TEMPERATURE}
METHODS: dict[str, dict[str, Any]] = {
    "scratch": {},
    "init": {},
    "distill": DISTILLED,
    "both": DISTILLED,
    "interpolate": {**DISTILLED, "task_share": SHARE, "interpolation_points": list(POINTS)},
}
STAGES = {
    1: [*((method, 0) for method in METHODS), ("init", 1), ("both", 2), ("distill", 3)],
    2: [("both", 0), ("scratch", 1), ("init", 1), ("distill", 2), ("both", 3), ("interpolate", 3)],
}
"""On how many ranks: methods, and the ZeRO stages that they run at."""
LONG, UNEVEN = "long", 400
"""A Llama of as many positions and more, and the tokens that its texts are cut at."""
Batch = dict[str, torch.Tensor]


def make_uneven_task(folder: Path) -> Path:
    """Three rows: 64 and 320 tokens to be told, and a prompt that leaves room for none."""
    folder.mkdir()
    draw = random.Random(4)
    lengths = [(5, 63), (20, 319), (UNEVEN + 1, 5)]  # an end token follows
    rows = [
        {key: " ".join(draw.choices(WORDS, k=size)) for key, size in zip(("prompt", "response"), pair, strict=True)}
        for pair in lengths
    ]
    for name in ("train", "dev"):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


class World:
    """Of each family a base, its upgrade and weights tuned elsewhere; and a task for all of them."""

    def __init__(self, root: Path) -> None:
        self.root, self.task = root, make_answers_task(root / "task")
        self.uneven = make_uneven_task(root / "uneven")
        for family in (*FAMILIES, LONG):
            changed = {"max_position_embeddings": 512} if family == LONG else {}
            base = make_decoder(root / family / "base", "llama" if family == LONG else family, **changed)
            make_upgraded(base, root / family / "new", scale=0.05)
            make_tuned(base, root / family / "tuned")
            folder = root / family / "weights"
            folder.mkdir()
            import_weights(root / family / "tuned", str(base), folder, name="chat", codec=None, task=None, told=NOTHING)

    def run(self, family: str, method: str, stage: int = 0, ranks: int = 1, **changed: Any) -> dict[str, Any]:
        folder = self.root / family
        settings = {
            **{**COMMON, "max_steps": STEPS, "warmup_steps": WARMUP, "eval_every": STEPS, "learning_rate": RATE},
            **{"method": method, "task": str(self.task), "out": out(folder, method, stage, ranks)},
            **{"base": folder / "new", "old_base": folder / "base", "weights": folder / "weights"},
            **METHODS[method],
            **changed,
        }
        zero = {"stage": stage, **(STAGE_3 if stage == 3 else {})}
        micro = max(1, settings["train_batch_size"] // 2 // ranks)
        ds_config = {"train_micro_batch_size_per_gpu": micro, "zero_optimization": zero}
        return {"verb": "recycle", "config": settings, "ds_config": ds_config}


def out(folder: Path, method: str, stage: int, ranks: int) -> Path:
    return folder / f"{method}-{stage}-{ranks}"


def make_tuned(base: Path, folder: Path) -> Path:
    """A base with noise on it, and nothing that says for what."""
    shutil.copytree(base, folder)
    noise = torch.Generator().manual_seed(5)
    tensors = load_file(folder / "model.safetensors")
    tensors = {name: t + 0.05 * torch.randn(t.shape, generator=noise) for name, t in sorted(tensors.items())}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    world = World(tmp_path_factory.mktemp("text"))
    one, two = (
        [world.run(family, method, stage, ranks) for family in FAMILIES for method, stage in STAGES[ranks]]
        for ranks in (1, 2)
    )
    changed = {"task": str(world.uneven), "max_length": UNEVEN, "train_batch_size": 3}
    three = [world.run(LONG, method, 3, 3, **changed) for method in ("both", "interpolate")]
    started = {"one": start(world.root / "one", one), "two": start(world.root / "two", two, nproc=2)}
    started["three"] = start(world.root / "three", three, nproc=3)
    for name, process in started.items():
        finish(process, world.root / name, timeout_s=900)
    return world


# ---- the oracle --------------------------------------------------------------------------------------------------


def plain_model(family: str, folder: Path) -> nn.Module:
    auto = AutoModelForSeq2SeqLM if family == "t5" else AutoModelForCausalLM
    return auto.from_pretrained(folder, dtype=torch.float32).eval()


def with_difference(family: str, folder: Path, base: str) -> nn.Module:
    """A base with tuned - base added."""
    model, tuned, old = (plain_model(family, folder / name) for name in (base, "tuned", "base"))
    with torch.no_grad():
        for parameter, after, before in zip(model.parameters(), tuned.parameters(), old.parameters(), strict=True):
            parameter += after - before
    return model


def plain_batch(family: str, folder: Path, rows: list[dict[str, str]]) -> Batch:
    """Inputs and labels [B, L], -100 where nothing is to be told."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    texts, labels, decoded = [], [], []
    for row in rows:
        prompt, answer = (tokenizer(row[name])["input_ids"] for name in ("prompt", "response"))
        if family == "t5":  # both end in </s>
            texts.append(prompt)
            labels.append(answer)
            decoded.append([PAD, *answer[:-1]])
        else:
            texts.append([*prompt, *answer, END][:UNEVEN])
            labels.append(([-100] * len(prompt) + [*answer, END])[:UNEVEN])

    def padded(lists: list[list[int]], filler: int) -> torch.Tensor:
        return nn.utils.rnn.pad_sequence([torch.tensor(one) for one in lists], batch_first=True, padding_value=filler)

    batch = {"input_ids": padded(texts, PAD), "labels": padded(labels, -100)}
    batch["attention_mask"] = padded([[1] * len(text) for text in texts], 0)
    return {**batch, **({"decoder_input_ids": padded(decoded, PAD)} if decoded else {})}


def told(model: nn.Module, batch: Batch, weights: dict[str, torch.Tensor] | None = None) -> Any:
    """Logits of the tokens that predict, and each row's states there."""
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    given = {**inputs, "output_hidden_states": True, "use_cache": False}
    output = model(**given) if weights is None else functional_call(model, weights, kwargs=given)
    seq2seq = "decoder_input_ids" in batch
    where = (batch["labels"] if seq2seq else batch["labels"].roll(-1, 1)) != -100
    states = torch.stack((output.decoder_hidden_states if seq2seq else output.hidden_states)[:-1], dim=2)
    return output.logits[where], [states[row, where[row]] for row in range(len(where)) if where[row].any()]


def taught(student: Any, teacher: Any) -> torch.Tensor:
    (ours, own_states), (theirs, states) = student, teacher
    p = (theirs / TEMPERATURE).softmax(-1)
    kl = (p * (p.log() - (ours / TEMPERATURE).log_softmax(-1))).sum(-1).mean()
    patient = torch.stack([0.5 * nn.functional.mse_loss(a, b) for a, b in zip(own_states, states, strict=True)]).mean()
    return ALPHA * TEMPERATURE**2 * kl + BETA * patient


def plain_losses(family: str, folder: Path, task: Path, method: str, batch_size: int = BATCH) -> list[float]:
    fresh = method in ("scratch", "distill")
    student = plain_model(family, folder / "new") if fresh else with_difference(family, folder, "new")
    teacher = with_difference(family, folder, "base").requires_grad_(False)
    rows = [json.loads(line) for line in (task / "train.jsonl").read_text().splitlines()]
    order, own = Order(len(rows), batch_size, SEED), dict(student.named_parameters())
    fixed = {name: parameter.detach() for name, parameter in teacher.named_parameters()}

    def loss_of(step: int) -> torch.Tensor:
        batch = plain_batch(family, folder, [rows[index] for _, index in order.step(step)])
        answered = told(student, batch)
        targets = batch["labels"][batch["labels"] != -100]
        task_loss = nn.functional.cross_entropy(answered[0], targets)
        if method in ("scratch", "init"):
            return task_loss
        with torch.no_grad():
            says = told(teacher, batch)
        if method != "interpolate":
            return (1 - ALPHA) * task_loss + taught(answered, says)
        soft = taught(answered, says)
        for x in POINTS:
            mixed = {name: x * value + (1 - x) * fixed[name] for name, value in own.items()}
            soft = soft + taught(told(student, batch, mixed), says)
        return SHARE * task_loss + (1 - SHARE) * soft

    return plain_training(student, list(own), loss_of, RATE, WARMUP, STEPS)


@pytest.fixture(scope="module")
def oracle(world: World) -> Callable[[str, str], list[float]]:
    return cache(lambda family, method: plain_losses(family, world.root / family, world.task, method))


# ---- training ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ranks", "method", "stage"), [(ranks, *run) for ranks, runs in STAGES.items() for run in runs]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_ranks_train_as_a_plain_loop(
    world: World, oracle: Any, family: str, ranks: int, method: str, stage: int
) -> None:
    run = out(world.root / family, method, stage, ranks)
    assert outcome(run) == {}
    assert scalars(run, "train/loss") == pytest.approx(oracle(family, method), rel=LOSS_TOLERANCE)


@pytest.mark.parametrize("method", ["both", "interpolate"])
def test_ranks_with_64_and_320_tokens_and_none_train_as_a_plain_loop(world: World, method: str) -> None:
    run = out(world.root / LONG, method, 3, 3)
    assert outcome(run) == {}
    wanted = plain_losses(LONG, world.root / LONG, world.uneven, method, 3)
    assert scalars(run, "train/loss") == pytest.approx(wanted, rel=LOSS_TOLERANCE)
