"""Tasks answered in text are tuned and recycled as plain PyTorch would, on any number of ranks, at any stage."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from answers import make_answers_task
from decoders import make_decoder
from peft import LoraConfig, get_peft_model
from plain import (
    ALPHA,
    COMMON,
    LOSS_TOLERANCE,
    SHARE,
    TEMPERATURE,
    WEIGHT_TOLERANCE,
    largest_difference,
    saved_tensors,
)
from plain_answers import (
    BETA,
    CUT,
    LORA,
    LORA_RATE,
    POINTS,
    RATE,
    STEPS,
    WARMUP,
    Expected,
    expected_of,
    plain_model,
    task_type,
)
from processes import STAGE_3, finish, outcome, scalars, start
from rows import write_rows
from safetensors.torch import load_file, save_file
from worlds import WORDS, make_upgraded

from recyclable.recipes.importing import import_weights
from recyclable.recipes.tuned_elsewhere import NOTHING
from recyclable.weights.manifest import read_manifest

FAMILIES = ("gpt2", "llama", "qwen3", "gemma3_text", "t5")
DISTILLED = {"alpha": ALPHA, "beta": BETA, "temperature": TEMPERATURE}
METHODS: dict[str, dict[str, Any]] = {
    "scratch": {},
    "init": {},
    "distill": DISTILLED,
    "both": DISTILLED,
    "interpolate": {**DISTILLED, "task_share": SHARE, "interpolation_points": list(POINTS)},
}
LONG = "long"
"""A Llama of as many positions as texts are cut at, and more."""


class Run(NamedTuple):
    """One training run."""

    family: str
    what: str
    """A method, `lora_METHOD` of an adapter, `choice_METHOD` on a task of choice, `tune` or `tune_lora`."""
    stage: int
    ranks: int

    def out(self, root: Path) -> Path:
        return root / self.family / f"{self.what}-{self.stage}-{self.ranks}"


def grid() -> list[Run]:
    """Each family at other stages: together they are trained by every method at every one, on 1 and 2 ranks."""
    runs = [
        Run(family, method, (turn + place + ranks) % 4, ranks)
        for ranks in (1, 2)
        for turn, family in enumerate(FAMILIES)
        for place, method in enumerate(METHODS)
    ]
    runs += [Run(family, method, 3, 2) for family in FAMILIES for method in ("both", "interpolate")]
    for family in ("llama", "t5"):
        runs += [Run(family, what, *at) for what in ("tune", "tune_lora") for at in ((3, 1), (1, 2), (3, 2))]
    runs += [Run("llama", what, 3, 2) for what in ("lora_init", "lora_both", "choice_both")]
    return list(dict.fromkeys(runs))


def make_uneven_task(folder: Path) -> Path:
    """Three rows: 64 and 320 tokens to be told, and a prompt that leaves room for none."""
    folder.mkdir()
    draw = random.Random(4)
    lengths = [(5, 63), (20, 319), (CUT + 1, 5)]  # an end token follows
    rows = [
        {key: " ".join(draw.choices(WORDS, k=size)) for key, size in zip(("prompt", "response"), pair, strict=True)}
        for pair in lengths
    ]
    for name in ("train", "dev"):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def make_choice_task(folder: Path) -> Path:
    """Two to four options of one to four words, of which one is right."""
    draw = random.Random(6)
    for name, size in (("train", 40), ("dev", 8), ("test", 5)):
        rows = []
        for _ in range(size):
            prompt, *choices = (draw.choices(WORDS, k=draw.randint(1, 4)) for _ in range(draw.randint(3, 5)))
            texts = [" " + " ".join(words) for words in choices]
            rows.append({"prompt": " ".join(prompt), "choices": texts, "answer": draw.randrange(len(texts))})
        write_rows(folder / f"{name}.jsonl", rows)
    return folder


class World:
    """Of each family a base, its upgrade and weights tuned elsewhere, of Llama an adapter as well; and tasks."""

    def __init__(self, root: Path) -> None:
        self.root, self.task = root, make_answers_task(root / "task")
        self.uneven, self.choice = make_uneven_task(root / "uneven"), make_choice_task(root / "choice")
        for family in (*FAMILIES, LONG):
            changed = {"max_position_embeddings": 512} if family == LONG else {}
            base = make_decoder(root / family / "base", "llama" if family == LONG else family, **changed)
            make_upgraded(base, root / family / "new", scale=0.05)
            self._imported(base, make_tuned(base, root / family / "tuned"), root / family / "weights")
        base = root / "llama" / "base"
        self._imported(base, make_tuned_lora(base, root / "llama" / "tuned_lora"), root / "llama" / "lora_weights")

    def _imported(self, base: Path, tuned: Path, weights: Path) -> None:
        weights.mkdir()
        import_weights(tuned, str(base), weights, name="chat", codec=None, task=None, told=NOTHING)

    def run(self, run: Run, **changed: Any) -> dict[str, Any]:
        folder, (before, _, method) = self.root / run.family, run.what.rpartition("_")
        settings: dict[str, Any] = {
            **{**COMMON, "max_steps": STEPS, "warmup_steps": WARMUP, "eval_every": STEPS},
            **{"learning_rate": LORA_RATE if "lora" in run.what else RATE, "base": folder / "new"},
            **{"task": str(self.choice if before == "choice" else self.task), "out": run.out(self.root)},
        }
        if run.what.startswith("tune"):
            settings |= {"tuning": "lora", **LORA} if before else {"tuning": "full"}
        else:
            weights = folder / ("lora_weights" if before == "lora" else "weights")
            settings |= {"method": method, "old_base": folder / "base", "weights": weights, **METHODS[method]}
        settings |= changed
        zero = {"stage": run.stage, **(STAGE_3 if run.stage == 3 else {})}
        micro = max(1, settings["train_batch_size"] // 2 // run.ranks)
        ds_config = {"train_micro_batch_size_per_gpu": micro, "zero_optimization": zero}
        return {"verb": "recycle" if "method" in settings else "tune", "config": settings, "ds_config": ds_config}


def make_tuned(base: Path, folder: Path) -> Path:
    """A base with noise on it, and nothing that says for what."""
    shutil.copytree(base, folder)
    noise = torch.Generator().manual_seed(5)
    tensors = load_file(folder / "model.safetensors")
    tensors = {name: t + 0.05 * torch.randn(t.shape, generator=noise) for name, t in sorted(tensors.items())}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def make_tuned_lora(base: Path, folder: Path) -> Path:
    """An adapter of a Llama, far from doing nothing."""
    config = LoraConfig(task_type=task_type("llama"), r=3, target_modules="all-linear")
    model, noise = get_peft_model(plain_model("llama", base), config), torch.Generator().manual_seed(8)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                parameter.normal_(0, 0.2, generator=noise)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    world = World(tmp_path_factory.mktemp("text"))
    changed = {"task": str(world.uneven), "max_length": CUT, "train_batch_size": 3}
    of_ranks = {ranks: [world.run(run) for run in grid() if run.ranks == ranks] for ranks in (1, 2)}
    of_ranks[3] = [world.run(Run(LONG, method, 3, 3), **changed) for method in ("both", "interpolate")]
    started = {n: start(world.root / str(n), runs, nproc=n if n > 1 else None) for n, runs in of_ranks.items()}
    for ranks, process in started.items():
        finish(process, world.root / str(ranks), timeout_s=900)
    return world


@pytest.fixture(scope="module")
def oracle(world: World) -> Callable[[str, str], Expected]:
    def expected(family: str, what: str) -> Expected:
        task = world.choice if what.startswith("choice") else world.task
        return expected_of(family, world.root / family, task, what.removeprefix("choice_"))

    return cache(expected)


def test_every_method_is_trained_at_every_stage_on_one_and_on_two_ranks() -> None:
    trained = {(run.what, run.stage, run.ranks) for run in grid()}
    assert {(method, stage, ranks) for method in METHODS for stage in range(4) for ranks in (1, 2)} <= trained


@pytest.mark.parametrize("run", grid(), ids=lambda run: "-".join(map(str, run)))
def test_ranks_train_as_a_plain_loop(world: World, oracle: Any, run: Run) -> None:
    out, expected = run.out(world.root), oracle(run.family, run.what)
    assert outcome(out) == {}
    assert scalars(out, "train/loss") == pytest.approx(expected.losses, rel=LOSS_TOLERANCE)
    if not run.what.startswith("choice"):  # of which dev's accuracy, not its likelihood, selects the step
        scores = read_manifest(out).metrics["test"]
        assert scores["log_likelihood"] == pytest.approx(expected.likelihood, rel=LOSS_TOLERANCE)
    if "lora" in run.what:
        saved = saved_tensors(out, world.root / run.family / "new")
        assert largest_difference(saved, expected.weights) <= WEIGHT_TOLERANCE


@pytest.mark.parametrize("method", ["both", "interpolate"])
def test_ranks_with_64_and_320_tokens_and_none_train_as_a_plain_loop(world: World, method: str) -> None:
    out = Run(LONG, method, 3, 3).out(world.root)
    assert outcome(out) == {}
    wanted = expected_of(LONG, world.root / LONG, world.uneven, method, 3)
    assert scalars(out, "train/loss") == pytest.approx(wanted.losses, rel=LOSS_TOLERANCE)
