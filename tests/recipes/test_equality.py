"""Training on 1 and 2 ranks under every ZeRO stage is training in one plain PyTorch process, step by step.

The oracle shares with the package which examples make up a step, how they are masked, and freshly drawn heads; model,
loss, optimizer, clipping, schedule and arithmetic on weights are written here a second time, from the papers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from plain import (
    ADAPTER_RATE,
    ALPHA,
    BATCH,
    BETA,
    COMMON,
    LENGTH,
    LOSS_TOLERANCE,
    RATE,
    SEED,
    STEPS,
    TEMPERATURE,
    WARMUP,
    WEIGHT_TOLERANCE,
    largest_difference,
    plain_training,
    saved_tensors,
    short,
)
from processes import STAGE_3, finish, outcome, scalars, start
from safetensors.torch import load_file
from torch import nn
from train_ranks import with_lora
from transformers import BertForMaskedLM, BertForSequenceClassification
from worlds import make_base, make_corpus, make_outdated, make_task, make_upgraded

from recyclable.data.blocks import MaskedBlocks
from recyclable.data.corpus import load_corpus, pack
from recyclable.data.examples import LabelledTexts
from recyclable.data.order import Order
from recyclable.models.language import language_model
from recyclable.models.tasks import task_model
from recyclable.tasks.parts.fewshot import k_shot
from recyclable.tasks.parts.task import load_task
from recyclable.tunings import TUNINGS
from recyclable.weights.base import Base
from recyclable.weights.sources import fill
from recyclable.weights.vocabulary import load_tokenizer

SHOTS, HEAD_STEPS, HEAD_RATE = 16, 5, 5e-3
SIZES = {"full": {}, "lora": {"lora_r": 4}, "bottleneck": {"bottleneck_size": 8}}
# What is trained -> micro-batch per rank on 1 and on 2 ranks (less than 12 / ranks means accumulation), ZeRO stages.
ALL = (0, 1, 2, 3)
PLAN = {
    "pretrain": {1: (12, ALL), 2: (6, ALL)},
    "pretrain_accumulating": {1: (4, (2,)), 2: (2, (0, 1, 3))},
    "pretrain_fresh_head": {2: (6, (2, 3))},
    "pretrain_taught": {1: (12, ALL), 2: (6, ALL)},
    "pretrain_taught_untied": {1: (12, (3,)), 2: (3, ALL)},
    "pretrain_taught_lora": {1: (12, (3,)), 2: (6, ALL)},
    "tune": {1: (12, ALL), 2: (6, ALL)},
    "tune_lora": {2: (6, (1, 3))},
    "tune_bottleneck": {2: (6, (2, 3))},
    "recycle_both": {1: (12, ALL), 2: (3, ALL)},
}
RUNS = [(name, n, stage) for n in (1, 2) for name, plan in PLAN.items() if n in plan for stage in plan[n][1]]
BF16_RUNS = [
    *[(name, 2, 3, "bf16") for name in ("pretrain", "pretrain_taught", "tune")],
    *[("tune", 2, stage, "bf16") for stage in (1, 2)],
    *[("pretrain_taught", ranks, stage, "autocast") for ranks, stage in ((1, 0), (2, 3))],
]


@dataclass(frozen=True)
class World:
    """Where the small world of this file lies."""

    folder: Path

    def __getattr__(self, name: str) -> Path:
        return self.folder / name

    def out(self, name: str, ranks: int, stage: int, precision: str = "fp32") -> Path:
        return self.folder / f"{name}-{ranks}-{stage}-{precision}"


@dataclass(frozen=True)
class Expected:
    """What the oracle computed."""

    losses: list[float]
    tensors: dict[str, torch.Tensor]
    """Trained values after the last step, by names without the prefix `bert.`."""
    scores: dict[str, float]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    world = World(tmp_path_factory.mktemp("equality"))
    make_base(world.base)
    make_base(world.headless, mlm_head=False)
    make_base(world.untied, tied=False)
    make_upgraded(world.base, world.upgraded)
    make_upgraded(world.untied, world.untied_teacher)
    make_task(world.task)
    make_corpus(world.corpus)
    make_outdated(world.base, world.task, world.outdated)
    return world


def run(world: World, name: str, ranks: int, stage: int, precision: str = "fp32") -> dict[str, Any]:
    verb, _, kind = name.partition("_")
    config: dict[str, Any] = {**COMMON, "out": world.out(name, ranks, stage, precision)}
    if verb == "pretrain":
        config.update(base=world.base, corpus=str(world.corpus))
        if kind == "fresh_head":
            config.update(base=world.headless, mlm_head_steps=HEAD_STEPS, mlm_head_learning_rate=HEAD_RATE)
        if kind.startswith("taught"):
            config.update(teacher=world.upgraded, alpha=ALPHA, beta=BETA, temperature=TEMPERATURE)
        if kind == "taught_untied":
            config.update(base=world.untied, teacher=world.untied_teacher)
        config.update({"learning_rate": ADAPTER_RATE} if kind == "taught_lora" else {})
    elif verb == "tune":
        tuning = kind or "full"
        config.update(base=world.base, task=str(world.task), tuning=tuning, **SIZES[tuning])
        config.update({"learning_rate": ADAPTER_RATE} if kind else {})
    else:
        config.update(base=world.upgraded, old_base=world.base, weights=world.outdated, task=str(world.task))
        config.update(method=kind, alpha=ALPHA, beta=BETA, temperature=TEMPERATURE, shots=SHOTS)
    ds_config = {"train_micro_batch_size_per_gpu": PLAN[name][ranks][0], "zero_optimization": {"stage": stage}}
    if stage == 3:
        ds_config["zero_optimization"].update(STAGE_3)
    if precision == "bf16":
        ds_config["bf16"] = {"enabled": True}
    if precision == "autocast":
        ds_config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    return {"verb": verb, "config": config, "ds_config": ds_config, "lora": kind == "taught_lora"}


@pytest.fixture(scope="module")
def trained(world: World) -> World:
    """The world after all runs: in one process without a launcher, and on two ranks under it."""
    for ranks in (1, 2):
        folder = world.folder / f"ranks-{ranks}"
        runs = [run(world, *which) for which in RUNS if which[1] == ranks]
        runs += [run(world, *which) for which in BF16_RUNS if which[1] == ranks]
        finish(start(folder, runs, nproc=ranks if ranks > 1 else None), folder)
    return world


def largest_relative_difference(found: list[float], expected: list[float]) -> float:
    assert len(found) == len(expected) == STEPS
    return max(abs(f - e) / abs(e) for f, e in zip(found, expected, strict=True))


# ---- the oracle --------------------------------------------------------------------------------------------------


def pretrain_oracle(world: World, kind: str) -> Expected:
    folder = {"fresh_head": world.headless, "taught_untied": world.untied}.get(kind, world.base)
    tokenizer = load_tokenizer(folder)
    packed = pack(load_corpus(str(world.corpus)), tokenizer, LENGTH)
    cut = len(packed) - round(0.02 * len(packed))
    examples = MaskedBlocks(packed, tokenizer, 0.15, SEED, range(cut))
    order = Order(cut, BATCH, SEED)
    model: nn.Module = BertForMaskedLM.from_pretrained(folder)

    def mean_loss(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        labels = torch.full_like(batch["input_ids"], -100).flatten()
        labels[batch["positions"]] = batch["targets"]
        return model(input_ids=batch["input_ids"], labels=labels.view_as(batch["input_ids"])).loss

    def loss_of(step: int) -> torch.Tensor:
        return mean_loss(examples.batch(order.step(step)))

    if kind == "fresh_head":
        drawn, fresh = language_model(Base(folder), "MaskedLM", SEED, None)
        model.load_state_dict(fill(drawn).state_dict())
        plain_training(model, fresh, loss_of, HEAD_RATE, 0, HEAD_STEPS)
    if kind == "taught_lora":
        model = with_lora(model)
    if kind.startswith("taught"):
        wise = world.untied_teacher if kind == "taught_untied" else world.upgraded
        teacher = BertForMaskedLM.from_pretrained(wise).requires_grad_(False).eval()

        def loss_of(step: int) -> torch.Tensor:
            batch = examples.batch(order.step(step))
            s, t = (m(input_ids=batch["input_ids"], output_hidden_states=True) for m in (model, teacher))
            p, q = ((o.logits.flatten(0, 1)[batch["positions"]] / TEMPERATURE).softmax(-1) for o in (t, s))
            kl = (p * (p / q).log()).sum() / len(batch["targets"])
            states = [torch.stack([h[:, 0] for h in out.hidden_states[:-1]]) for out in (s, t)]
            patient = 0.5 * nn.functional.mse_loss(*states)
            return (1 - ALPHA) * mean_loss(batch) + ALPHA * TEMPERATURE**2 * kl + BETA * patient

    names = [n for n, _ in model.named_parameters() if kind != "taught_lora" or "lora_" in n]
    before = mean_heldout(mean_loss, packed, tokenizer, cut)
    losses = plain_training(model, names, loss_of, ADAPTER_RATE if "lora" in kind else RATE, WARMUP, STEPS)
    scores = {"before": before, "after": mean_heldout(mean_loss, packed, tokenizer, cut)}
    return Expected(losses, short({n: p for n, p in model.named_parameters() if n in names}), scores)


@torch.no_grad()
def mean_heldout(mean_loss: Callable, packed: Any, tokenizer: Any, cut: int) -> float:
    """Over all masked tokens of the sequences set aside; they are masked as in epoch 2^31."""
    heldout = MaskedBlocks(packed, tokenizer, 0.15, SEED, range(cut, len(packed)))
    return mean_loss(heldout.batch([(2**31, row) for row in range(len(heldout))])).item()


def classifier(folder: Path, task: Any) -> BertForSequenceClassification:
    """The base with the head (and the pooler it lacks) that the package draws from the seed."""
    model = BertForSequenceClassification.from_pretrained(folder, num_labels=len(task.labels))
    model.load_state_dict(fill(task_model(Base(folder), task, SEED)).state_dict())
    return model.eval()


def accuracy(model: nn.Module, examples: LabelledTexts) -> float:
    batch = examples.batch([(0, row) for row in range(len(examples))])
    labels = batch.pop("labels")
    with torch.no_grad():
        return (model(**batch).logits.argmax(-1) == labels).float().mean().item()


def tune_oracle(world: World, kind: str) -> Expected:
    task, tokenizer = load_task(str(world.task)), load_tokenizer(world.base)
    examples = LabelledTexts(task.splits["train"], tokenizer, LENGTH)
    order = Order(len(examples), BATCH, SEED)
    model: nn.Module = classifier(world.base, task)
    heads = ("classifier.", "bert.pooler.")
    trainable = [name for name, _ in model.named_parameters()]
    if kind == "lora":
        start = model
        model = get_peft_model(
            classifier(world.base, task),
            LoraConfig(
                task_type="SEQ_CLS", r=4, lora_alpha=16, target_modules=["query", "value"], modules_to_save=["pooler"]
            ),
        )
        model.load_state_dict(adapted_start(start, task, world, "lora"))
        trainable = [n for n, _ in model.named_parameters() if "lora_" in n or "modules_to_save" in n]
    elif kind == "bottleneck":
        model, trainable = with_bottlenecks(model, adapted_start(classifier(world.base, task), task, world, kind))
        trainable += [n for n, _ in model.named_parameters() if "LayerNorm" in n or n.startswith(heads)]

    def loss_of(step: int) -> torch.Tensor:
        batch = examples.batch(order.step(step))
        labels = batch.pop("labels")
        return -model(**batch).logits.log_softmax(-1)[torch.arange(len(labels)), labels].mean()

    losses = plain_training(model, trainable, loss_of, ADAPTER_RATE if kind else RATE, WARMUP, STEPS)
    tensors = {name: p for name, p in model.named_parameters() if name in trainable}
    test = LabelledTexts(task.splits["test"], tokenizer, LENGTH)
    return Expected(losses, short(tensors), {"accuracy": accuracy(model, test)})


def adapted_start(model: nn.Module, task: Any, world: World, kind: str) -> dict[str, torch.Tensor]:
    """State of a model with the freshly drawn adapter that the package would train."""
    return dict(TUNINGS.get(kind)(**SIZES[kind]).attach(model, "SEQ_CLS", SEED).state_dict())


def with_bottlenecks(model: nn.Module, start: dict[str, torch.Tensor]) -> tuple[nn.Module, list[str]]:
    """y + up(gelu(down(y))) behind both projections of each layer, as forward hooks; names of their weights."""
    for i, layer in enumerate(model.bert.encoder.layer):
        for place, dense in (("attention.output", layer.attention.output.dense), ("output", layer.output.dense)):
            there = f"base_model.model.bert.encoder.layer.{i}.{place}.dense.bottleneck_"
            down, up = nn.Linear(dense.out_features, 8), nn.Linear(8, dense.out_features)
            for linear, name in ((down, "down"), (up, "up")):
                linear.load_state_dict({k: start[f"{there}{name}.default.{k}"] for k in ("weight", "bias")})
            dense.register_forward_hook(lambda _, __, y, down=down, up=up: y + up(nn.functional.gelu(down(y))))
            dense.bottleneck_down, dense.bottleneck_up = down, up  # part of the model, under the names PEFT saves
    return model, [name for name, _ in model.named_parameters() if ".bottleneck_" in name]


def both_oracle(world: World) -> Expected:
    task, tokenizer = load_task(str(world.task)), load_tokenizer(world.upgraded)
    few, _ = k_shot(task.splits["train"], SHOTS, SEED, task.splits["train"].labels)
    examples = LabelledTexts(few, tokenizer, LENGTH)
    order = Order(len(examples), BATCH, SEED)
    delta, head = load_file(world.outdated / "delta.safetensors"), load_file(world.outdated / "head.safetensors")

    def recycled(folder: Path) -> BertForSequenceClassification:
        """theta + delta for what the base has, pooler and classifier as they were."""
        model = BertForSequenceClassification.from_pretrained(folder, num_labels=3)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                name = name.removeprefix("bert.")
                parameter.copy_(parameter + delta[name] if name in delta else head[name])
        return model.eval()

    teacher, student = recycled(world.base).requires_grad_(False), recycled(world.upgraded)

    def loss_of(step: int) -> torch.Tensor:
        batch = examples.batch(order.step(step))
        labels = batch.pop("labels")
        s, t = (model(**batch, output_hidden_states=True) for model in (student, teacher))
        task_loss = nn.functional.cross_entropy(s.logits, labels)
        p, q = (t.logits / TEMPERATURE).softmax(-1), (s.logits / TEMPERATURE).softmax(-1)
        kl = (p * (p / q).log()).sum() / len(labels)
        states = [torch.stack([h[:, 0] for h in out.hidden_states[:-1]]) for out in (s, t)]
        patient = 0.5 * nn.functional.mse_loss(*states)
        return (1 - ALPHA) * task_loss + ALPHA * TEMPERATURE**2 * kl + BETA * patient

    names = [name for name, _ in student.named_parameters()]
    losses = plain_training(student, names, loss_of, RATE, WARMUP, STEPS)
    test = LabelledTexts(task.splits["test"], tokenizer, LENGTH)
    return Expected(losses, short(dict(student.named_parameters())), {"accuracy": accuracy(student, test)})


@pytest.fixture(scope="module")
def oracle(world: World) -> Callable[[str], Expected]:
    known: dict[str, Expected] = {}

    def expected(name: str) -> Expected:
        verb, _, kind = name.partition("_")
        if name not in known:
            if verb == "pretrain":
                known[name] = pretrain_oracle(world, kind)
            else:
                known[name] = tune_oracle(world, kind) if verb == "tune" else both_oracle(world)
        return known[name]

    return expected


# ---- what a run left behind, and the claims ----------------------------------------------------------------------


def base_of(world: World, name: str) -> Path:
    return world.upgraded if name.startswith("recycle") else world.base


def saved_scores(name: str, out: Path) -> dict[str, float]:
    if name.startswith("pretrain"):
        record = "lora.json" if name.endswith("lora") else "lineage.json"
        heldout = json.loads((out / record).read_text())["heldout"]
        return {when: heldout[when]["loss"] for when in ("before", "after")}
    metrics = json.loads((out / "manifest.json").read_text())["metrics"]
    assert metrics["best_step"] == STEPS, "the oracle has the weights of the last step"
    return {"accuracy": metrics["test"]["accuracy"]}


@pytest.mark.parametrize(("name", "ranks", "stage"), RUNS)
def test_losses_weights_and_scores_are_those_of_plain_pytorch(trained, oracle, record_property, name, ranks, stage):
    expected, out = oracle(name), trained.out(name, ranks, stage)
    assert outcome(out) == {}
    worst_loss = largest_relative_difference(scalars(out, "train/loss"), expected.losses)
    worst_weight = largest_difference(saved_tensors(out, base_of(trained, name)), expected.tensors)
    record_property("largest relative difference of losses", worst_loss)
    record_property("largest difference of weights", worst_weight)
    assert worst_loss <= LOSS_TOLERANCE
    assert worst_weight <= WEIGHT_TOLERANCE
    assert saved_scores(name, out) == pytest.approx(expected.scores, rel=LOSS_TOLERANCE)


@pytest.mark.parametrize("name", PLAN)
def test_the_comparison_would_notice_training_that_differs(oracle, name):
    """The losses fall by far more than the tolerance."""
    losses = oracle(name).losses
    assert np.mean(losses[-4:]) < 0.98 * np.mean(losses[:4])


def test_ranks_hold_unequal_numbers_of_masked_tokens(world):
    """So that a mean of the ranks' means would be another number than the mean over tokens."""
    tokenizer = load_tokenizer(world.base)
    packed = pack(load_corpus(str(world.corpus)), tokenizer, LENGTH)
    examples = MaskedBlocks(packed, tokenizer, 0.15, SEED, range(len(packed)))
    items = Order(len(packed), BATCH, SEED).step(0)
    counts = [len(examples.batch(items[half])["targets"]) for half in (slice(0, 6), slice(6, 12))]
    assert counts[0] != counts[1]


@pytest.mark.parametrize(("name", "ranks", "stage", "precision"), BF16_RUNS)
def test_bf16_learns_and_saves_its_fp32_master_weights(trained, oracle, name, ranks, stage, precision):
    expected, out = oracle(name), trained.out(name, ranks, stage, precision)
    assert outcome(out) == {}
    losses = scalars(out, "train/loss")
    assert all(map(math.isfinite, losses))
    assert np.mean(losses[-4:]) < 0.98 * np.mean(losses[:4])
    assert largest_relative_difference(losses, expected.losses) < 0.05
    saved = saved_tensors(out, base_of(trained, name))
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    trained_in_fp32 = [n for n, t in saved.items() if t.dim() > 1 and not torch.equal(t.bfloat16().float(), t)]
    assert set(trained_in_fp32) == {n for n, t in saved.items() if t.dim() > 1}, "values rounded to bf16 were saved"
    assert largest_difference(saved, expected.tensors) < RATE * STEPS
