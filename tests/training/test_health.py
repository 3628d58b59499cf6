"""A bad step leaves no trace in the weights, at every stage and in every precision: the run is the one without it."""

from __future__ import annotations

import hashlib
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from plain import BETAS, CLIP, DECAY, EPSILON, largest_difference, saved_tensors, short
from processes import STAGE_3, finish, outcome, start
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from transformers import BertForSequenceClassification
from worlds import make_base, make_task

from recyclable.config.settings import TrainSettings
from recyclable.data.examples import LabelledTexts
from recyclable.data.order import Order
from recyclable.errors import RunError
from recyclable.models.tasks import task_model
from recyclable.tasks.parts.task import load_task
from recyclable.training.checkpoint.record import Progress
from recyclable.training.health import Health
from recyclable.weights.base import Base
from recyclable.weights.sources import fill
from recyclable.weights.vocabulary import load_tokenizer

STEPS, BATCH, LENGTH, SEED, RATE = 16, 8, 16, 7, 2e-3
BAD = {0: "gradient", 11: "loss", 12: "infinite", 13: "gradient", 14: "spike"}  # from 0
BF16, ON_HOST = {"bf16": {"enabled": True}}, {"offload_optimizer": {"device": "cpu"}}
TWO_PASSES = {"train_micro_batch_size_per_gpu": 2}  # of each rank make a step, else one
LAYOUTS = {
    **{f"{stage}-fp32": {"zero_optimization": {"stage": stage}} for stage in (0, 1)},
    **{f"{stage}-bf16": {"zero_optimization": {"stage": stage}, **BF16} for stage in (0, 2)},
    "1-bf16-fp32-sums": {"zero_optimization": {"stage": 1}, **BF16, "data_types": {"grad_accum_dtype": "fp32"}},
    "2-offload": {"zero_optimization": {"stage": 2, **ON_HOST}, **TWO_PASSES},
    "3-fp32": {"zero_optimization": {"stage": 3, **STAGE_3}},
    "3-bf16-offload": {"zero_optimization": {"stage": 3, **STAGE_3, **ON_HOST}, **BF16},
}
LATE = "0-bf16"
"""The layout whose ranks hear of a step at the next, as those with GPUs do."""
STOPPING = {"": ("2-offload", {2: "loss"}), "-late": (LATE, {3: "loss"}), "-at-once": ("0-fp32", {3: "loss"})}
"""Layout and bad step; that of `LATE` is told of when a checkpoint is due."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("health")
    make_base(folder / "base")
    make_task(folder / "task")
    return folder


def run(world: Path, out: str, layout: str, spoil: dict[str, Any], **settings: Any) -> dict[str, Any]:
    config = {
        **{"out": world / out, "base": world / "base", "task": str(world / "task"), "max_steps": STEPS},
        **{"train_batch_size": BATCH, "learning_rate": RATE, "lr_scheduler_type": "constant", "weight_decay": DECAY},
        **{"adam_beta1": BETAS[0], "adam_beta2": BETAS[1], "adam_epsilon": EPSILON, "max_grad_norm": CLIP},
        **{"seed": SEED, "max_length": LENGTH, "dropout": 0.0, "eval_every": STEPS, "save_every": 0, "log_every": 1},
        **{"bad_step": "skip", "max_bad_steps": 4, "spike_factor": 5.0, **settings},
    }
    return {"verb": "tune", "config": config, "ds_config": LAYOUTS[layout], "spoil": spoil, "late": layout == LATE}


@pytest.fixture(scope="module")
def two_ranks(world: Path) -> Path:
    """The world after all runs on two ranks, of which one alone meets what is bad."""
    runs = []
    for layout in LAYOUTS:
        runs.append(run(world, f"{layout}-spoiled", layout, BAD))
        runs.append(run(world, f"{layout}-absent", layout, dict.fromkeys(BAD, "absent")))
    for kind, (layout, bad) in STOPPING.items():
        told = {"layout": layout, "spoil": bad, "save_every": 2}
        stops = run(world, f"stops{kind}", **told, bad_step="stop")
        goes_on = {**run(world, f"stops{kind}", **told), "resume": True, "outcome": world / f"resumed{kind}"}
        runs += [stops, goes_on, run(world, f"never-stopped{kind}", **told)]
    for out, layout in (("too-many", "2-bf16"), ("too-many-late", LATE), ("too-many-at-once", "0-fp32")):
        runs.append(run(world, out, layout, {2: "loss", 3: "loss"}, max_bad_steps=1, max_steps=5))
    runs.append(run(world, "at-once", "3-fp32", {0: "gradient"}, bad_step="stop"))
    finish(start(world / "two", runs, nproc=2), world / "two", timeout_s=900)
    return world


def tensors(out: Path) -> dict[str, str]:
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in out.glob("*.safetensors")}
    assert found.keys() == {"delta.safetensors", "head.safetensors"}, outcome(out)
    record = json.loads((out / "manifest.json").read_text())
    assert record["metrics"]["best_step"] > 0, "what is kept is what the run began with"
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_weights_are_those_of_the_run_that_never_had_the_steps(two_ranks: Path, layout: str) -> None:
    assert tensors(two_ranks / f"{layout}-spoiled") == tensors(two_ranks / f"{layout}-absent")


@pytest.mark.parametrize("layout", ["0-fp32", "2-offload", "3-fp32"])
def test_the_weights_are_those_of_plain_training_without_the_steps(two_ranks: Path, layout: str) -> None:
    task, tokenizer = load_task(str(two_ranks / "task")), load_tokenizer(two_ranks / "base")
    examples = LabelledTexts(task.splits["train"], tokenizer, LENGTH)
    order = Order(len(examples), BATCH, SEED)
    model = BertForSequenceClassification.from_pretrained(two_ranks / "base", num_labels=len(task.labels))
    model.load_state_dict(fill(task_model(Base(two_ranks / "base"), task, SEED)).state_dict())
    model.eval()
    decayed = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": DECAY}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=BETAS, eps=EPSILON)
    for step in range(STEPS):
        if step in BAD:
            continue
        batch = examples.batch(order.step(step))
        labels = batch.pop("labels")
        nn.functional.cross_entropy(model(**batch).logits, labels).backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
    found = saved_tensors(two_ranks / f"{layout}-spoiled", two_ranks / "base")
    assert largest_difference(found, short(dict(model.named_parameters()))) < 1e-4


def test_what_was_left_out_is_told_and_recorded(two_ranks: Path) -> None:
    out = two_ranks / "2-offload-spoiled"
    record, log = json.loads((out / "manifest.json").read_text()), (two_ranks / "two" / "log").read_text()
    left_out = [step + 1 for step in BAD]
    assert record["metrics"]["skipped_steps"] == left_out
    assert record["history"][-1]["skipped"] == len(BAD)
    assert record["history"][-1]["examples"] == record["metrics"]["examples"] == (STEPS - len(BAD)) * BATCH
    assert "skipped" not in record["metrics"]["dev"]
    assert log.count(f"notice: step 12 is left out: the loss is nan; its batch is in {out / 'bad_steps'}\n") == 1
    untouched = json.loads((two_ranks / "2-offload-absent" / "manifest.json").read_text())
    assert "skipped_steps" not in untouched["metrics"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_logged_number_is_of_a_step_that_was_left_out(two_ranks: Path, layout: str) -> None:
    events = EventAccumulator(str(two_ranks / f"{layout}-spoiled" / "tensorboard")).Reload()
    for tag in events.Tags()["scalars"]:
        assert all(math.isfinite(event.value) for event in events.Scalars(tag)), tag
    for tag in ("train/loss", "train/grad_norm"):
        told = [event.step for event in events.Scalars(tag)]
        assert told == [step + 1 for step in range(STEPS) if step not in BAD], tag


def test_the_batch_is_kept_for_people_to_look_at(two_ranks: Path) -> None:
    folder = two_ranks / "2-offload-spoiled" / "bad_steps"
    told = json.loads((folder / "step-00000015.json").read_text())
    task, tokenizer = load_task(str(two_ranks / "task")), load_tokenizer(two_ranks / "base")
    examples = LabelledTexts(task.splits["train"], tokenizer, LENGTH)
    step = Order(len(examples), BATCH, SEED).step(14)
    assert [(each["epoch"], each["example"]) for each in told["examples"]] == step
    assert re.match(r"the loss is [\d.]+, more than 5 times the median of the last 10, [01]\.\d+$", told["problem"])
    assert told["loss"] > 5
    rows = []
    for rank in range(2):
        batch = load_file(folder / f"step-00000015-rank-{rank:05d}.safetensors")
        rows += [row for number in range(2) for row in batch[f"{number}.input_ids"].tolist()]
    assert words(rows) == words(examples.batch(step)["input_ids"].tolist())


def words(rows: list[list[int]]) -> list[list[int]]:
    """Without padding, which each micro-batch has its own of."""
    return sorted([token for token in row if token] for row in rows)


@pytest.mark.parametrize("kind", STOPPING)
def test_a_run_that_stops_publishes_nothing_and_goes_on_from_its_checkpoint(two_ranks: Path, kind: str) -> None:
    (bad,) = STOPPING[kind][1]
    stopped = outcome(two_ranks / f"stops{kind}")
    assert stopped["error"] == "RunError"
    assert stopped["message"].startswith(
        f"step {bad + 1}: the loss is nan; no weight was changed by it, its batch is in "
    )
    assert "and bad_step=skip" in stopped["message"]
    assert json.loads((two_ranks / f"resumed{kind}.json").read_text()) == {}
    assert tensors(two_ranks / f"stops{kind}") == tensors(two_ranks / f"never-stopped{kind}")
    assert (two_ranks / "two" / "log").read_text().count("resumed at step 2") == len(STOPPING)


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("too-many", "step 4: the loss is nan; more than max_bad_steps=1 in a row are bad"),
        ("too-many-late", "step 4: the loss is nan; more than max_bad_steps=1 in a row are bad"),
        ("too-many-at-once", "step 4: the loss is nan; more than max_bad_steps=1 in a row are bad"),
        ("at-once", "step 1: the norm of the gradients is no finite number; no weight was changed by it"),
    ],
)
def test_an_end_leaves_the_batch_and_no_result(two_ranks: Path, out: str, message: str) -> None:
    found = outcome(two_ranks / out)
    assert found["error"] == "RunError" and found["message"].startswith(message)
    assert list((two_ranks / out / "bad_steps").glob("*.json"))
    assert not (two_ranks / out / "manifest.json").exists() and not list((two_ranks / out).glob("delta*"))


class Engine:
    """What `Health` asks of one whose loss scale changes, in fp16, which needs a GPU."""

    class Optimizer:
        """Overflows for so many steps."""

        def __init__(self, overflows: int) -> None:
            self.loss_scaler = SimpleNamespace(
                dynamic=True, cur_scale=2.0**16, cur_iter=0, raise_error_at_min_scale=True
            )
            self.left, self.overflow = overflows, False

    def __init__(self, overflows: int) -> None:
        self.optimizer, self.taken = self.Optimizer(overflows), 0
        self.basic_optimizer = SimpleNamespace(step=lambda: None)
        self.module = SimpleNamespace(weights={"task": 1.0})

    def step(self) -> None:
        """As DeepSpeed's: halve the scale, or count."""
        optimizer = self.optimizer
        optimizer.overflow = optimizer.left > 0
        optimizer.left -= 1
        if optimizer.overflow:
            optimizer.loss_scaler.cur_scale /= 2
        else:
            self.taken += 1


def steps_of(engine: Engine, out: Path, losses: list[float], **changed: Any) -> Progress:
    settings = TrainSettings(out=out, max_steps=100, learning_rate=1e-3, **changed)
    progress = Progress()
    health = Health(engine, settings, progress, out)
    for loss in losses:
        health.step(torch.tensor([loss], dtype=torch.float64), torch.ones(1, dtype=torch.float64), [], [])
        progress.step += 1
    return progress


def test_overflows_that_find_the_loss_scale_are_counted_and_no_bad_steps(tmp_path: Path) -> None:
    engine = Engine(overflows=20)
    progress = steps_of(engine, tmp_path, [1.0] * 30, bad_step="stop")
    assert (progress.overflows, progress.skipped, engine.taken) == (20, [], 10)
    assert not engine.optimizer.loss_scaler.raise_error_at_min_scale
    assert not (tmp_path / "bad_steps").exists()


def test_overflows_without_end_are_bad(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"^step 64: the norm of the gradients is no finite number; no weight"):
        steps_of(Engine(overflows=1000), tmp_path, [1.0] * 100, bad_step="stop")


def test_a_bad_loss_leaves_the_loss_scale_as_it_was(tmp_path: Path) -> None:
    engine = Engine(overflows=2)  # DeepSpeed, too, finds its gradients to be none
    progress = steps_of(engine, tmp_path, [math.nan, math.inf, 1.0], bad_step="skip")
    assert progress.skipped == [1, 2] and progress.overflows == 0
    assert engine.optimizer.loss_scaler.cur_scale == 2.0**16


@pytest.mark.parametrize(("factor", "left_out"), [(None, []), (3.0, [12, 14]), (4.0, [14])])
def test_a_spike_is_measured_by_the_median_of_the_good_steps(
    tmp_path: Path, factor: float | None, left_out: list[int]
) -> None:
    losses = [100.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 3.5, 1.0, 9.0]
    progress = steps_of(Engine(overflows=0), tmp_path, losses, bad_step="skip", spike_factor=factor)
    assert progress.skipped == left_out
    good = [loss for step, loss in enumerate(losses, 1) if step not in left_out]
    assert progress.recent == ([] if factor is None else good)
