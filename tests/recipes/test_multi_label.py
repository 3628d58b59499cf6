"""Several labels per text through every verb: tuned, recycled by every method, evaluated, probed, stored, exported."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from plain import (
    ALPHA,
    BATCH,
    BETA,
    COMMON,
    LENGTH,
    LOSS_TOLERANCE,
    SEED,
    TEMPERATURE,
    WEIGHT_TOLERANCE,
    largest_difference,
    plain_training,
    saved_tensors,
    short,
)
from processes import STAGE_3, finish, outcome, scalars, start
from safetensors.torch import load_file
from torch import nn
from torch.distributions import Bernoulli, kl_divergence
from transformers import AutoTokenizer, BertForSequenceClassification, pipeline
from worlds import LABELS, make_base, make_labels_task, make_upgraded

from recyclable import teacher_loss
from recyclable.cli import main
from recyclable.data.order import Order
from recyclable.models.tasks import task_model
from recyclable.tasks.parts.task import load_task
from recyclable.weights.adapted import AdaptedWeights
from recyclable.weights.base import Base
from recyclable.weights.manifest import read_manifest
from recyclable.weights.sources import fill
from recyclable.weights.store import VARIABLE

STEPS, WARMUP, RATE = 16, 2, 1e-2
TRAINED = {**COMMON, "max_steps": STEPS, "warmup_steps": WARMUP, "eval_every": STEPS, "learning_rate": RATE}
UNTRAINED = {name: COMMON[name] for name in ("seed", "max_length", "eval_batch_size")}
DISTILLED = {"alpha": ALPHA, "beta": BETA, "temperature": TEMPERATURE}
SCORES = {"f1_micro", "f1_macro", "accuracy"}
METHODS: dict[str, dict[str, Any]] = {
    "scratch": {},
    "init": {"shots": 6},
    "distill": {"teacher": "cached", **DISTILLED},
    "online": {"method": "distill", "teacher": "online", **DISTILLED},
    "both": {"teacher": "online", **DISTILLED},
    "interpolate": {"interpolation_points": [0.5]},
    "apply": {},
    "auto": {"method": "apply", "scale": "auto", "strength_examples": 20},
}


class World:
    """A base that was tuned for one label a text, its upgrade, a task of several, and what training made of them."""

    def __init__(self, root: Path) -> None:
        self.root, self.base = root, make_base(root / "base")
        config = json.loads((self.base / "config.json").read_text())
        config["problem_type"] = "single_label_classification"
        (self.base / "config.json").write_text(json.dumps(config))
        self.upgraded = make_upgraded(self.base, root / "upgraded")
        self.task = make_labels_task(root / "task")

    def tune(self, name: str, **changed: Any) -> dict[str, Any]:
        settings = {"base": self.base, "task": str(self.task), **TRAINED, "out": self.root / name, **changed}
        return {"verb": "tune", "config": settings, "ds_config": {"train_micro_batch_size_per_gpu": 4}}

    def recycle(self, name: str, weights: str, **changed: Any) -> dict[str, Any]:
        shared = {"base": self.upgraded, "old_base": self.base, "weights": self.root / weights, "task": str(self.task)}
        settings = {"method": name, "out": self.root / name, **shared, **changed}
        trains = settings["method"] != "apply"
        ds_config = {"train_micro_batch_size_per_gpu": 12} if trains else {}
        return {"verb": "recycle", "config": {**(TRAINED if trains else UNTRAINED), **settings}, "ds_config": ds_config}

    def runs(self) -> list[dict[str, Any]]:
        """What one process does."""
        methods = [self.recycle(name, "full", **settings) for name, settings in METHODS.items()]
        refused = self.recycle("top", "full", method="distill", teacher_top_k=2)
        return [self.tune("full"), self.tune("lora", tuning="lora", lora_r=4), *methods, refused]

    def runs_on_two_ranks(self) -> list[dict[str, Any]]:
        sharded = {"train_micro_batch_size_per_gpu": 3, "zero_optimization": {"stage": 3, **STAGE_3}}
        return [{**self.tune("full-on-two"), "ds_config": sharded}]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    world = World(tmp_path_factory.mktemp("labels"))
    runs = {"one": (world.runs(), None), "two": (world.runs_on_two_ranks(), 2)}
    started = {name: start(world.root / name, of, nproc=ranks) for name, (of, ranks) in runs.items()}
    for name, process in started.items():
        finish(process, world.root / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, str(world.root / "store"))
        yield world


# ---- plain transformers


def plain_model(base: Path, task: Path) -> BertForSequenceClassification:
    """A base with the head that the package draws; transformers chooses the loss by the type of problem."""
    labelled = load_task(task)
    model = BertForSequenceClassification.from_pretrained(
        base, num_labels=len(labelled.labels), problem_type="multi_label_classification"
    )
    model.load_state_dict(fill(task_model(Base(base), labelled, SEED)).state_dict())
    return model.eval()


def with_weights(base: Path, weights: Path) -> BertForSequenceClassification:
    """base + difference, and the head."""
    delta, head = load_file(weights / "delta.safetensors"), load_file(weights / "head.safetensors")
    model = BertForSequenceClassification.from_pretrained(base, num_labels=3, problem_type="multi_label_classification")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            name = name.removeprefix("bert.")
            parameter.copy_(parameter + delta[name] if name in delta else head[name])
    return model.eval()


def encoded(world: World, texts: list[str], labels: list[list[int]]) -> dict[str, torch.Tensor]:
    tokenizer = AutoTokenizer.from_pretrained(world.base)
    made = tokenizer(texts, padding=True, truncation=True, max_length=LENGTH, return_tensors="pt")
    return {**made, "labels": torch.tensor(labels).float()}


def batches_of(world: World) -> Callable[[int], dict[str, torch.Tensor]]:
    """Each step's batch, made by hand."""
    train = load_task(world.task).splits["train"]
    order = Order(len(train), BATCH, SEED)

    def of(step: int) -> dict[str, torch.Tensor]:
        rows = train.take(index for _, index in order.step(step))
        return encoded(world, rows.texts, rows.labels)

    return of


def trained_plainly(model: nn.Module, loss_of: Callable[[int], torch.Tensor]) -> list[float]:
    return plain_training(model, [name for name, _ in model.named_parameters()], loss_of, RATE, WARMUP, STEPS)


def whole_sets_right(world: World, model: nn.Module) -> float:
    test = load_task(world.task).splits["test"]
    batch = encoded(world, test.texts, test.labels)
    with torch.no_grad():
        told = model(**batch).logits.sigmoid() > 0.5
    return float((told == (batch["labels"] == 1)).all(-1).float().mean())


def require_same(world: World, name: str, base: Path, model: nn.Module, losses: list[float]) -> None:
    assert outcome(world.root / name) == {}
    assert scalars(world.root / name, "train/loss") == pytest.approx(losses, rel=LOSS_TOLERANCE)
    tensors = short(dict(model.named_parameters()))
    assert largest_difference(saved_tensors(world.root / name, base), tensors) <= WEIGHT_TOLERANCE
    metrics = read_manifest(world.root / name).metrics
    assert metrics["metric"] == "f1_micro" and metrics["best_step"] == STEPS
    assert metrics["test"]["accuracy"] == pytest.approx(whole_sets_right(world, model))


@pytest.fixture(scope="module")
def tuned_plainly(world: World) -> tuple[nn.Module, list[float]]:
    model, batch = plain_model(world.base, world.task), batches_of(world)
    return model, trained_plainly(model, lambda step: model(**batch(step)).loss)


@pytest.mark.parametrize("name", ["full", "full-on-two"])
def test_tuning_is_that_of_plain_transformers(world: World, tuned_plainly, name: str) -> None:
    require_same(world, name, world.base, *tuned_plainly)
    losses = tuned_plainly[1]
    assert losses[-1] < 0.8 * losses[0] and read_manifest(world.root / name).metrics["test"]["f1_micro"] > 0.4


def test_recycling_with_a_teacher_is_that_of_plain_pytorch(world: World) -> None:
    teacher = with_weights(world.base, world.root / "full").requires_grad_(False)
    student, batch_of = with_weights(world.upgraded, world.root / "full"), batches_of(world)

    def loss_of(step: int) -> torch.Tensor:
        s, t = (model(**batch_of(step), output_hidden_states=True) for model in (student, teacher))
        kl = kl_divergence(*(Bernoulli(logits=of.logits / TEMPERATURE) for of in (t, s))).mean()
        states = (torch.stack([h[:, 0] for h in of.hidden_states[:-1]]) for of in (s, t))
        patient = 0.5 * nn.functional.mse_loss(*states)
        return (1 - ALPHA) * s.loss + ALPHA * TEMPERATURE**2 * kl + BETA * patient

    require_same(world, "both", world.upgraded, student, trained_plainly(student, loss_of))


def test_from_python_several_labels_are_distilled(world: World) -> None:
    test = load_task(world.task).splits["test"].take(range(8))
    student, teacher = (with_weights(base, world.root / "full") for base in (world.upgraded, world.base))
    batch = encoded(world, test.texts, test.labels)
    found = teacher_loss(student, world.root / "full", batch, old_base=world.base, temperature=3.0)
    p, q = (Bernoulli(logits=model(**batch).logits / 3.0) for model in (teacher, student))
    torch.testing.assert_close(found, 9 * kl_divergence(p, q).mean(), rtol=1e-4, atol=1e-6)


# ---- every method and verb


@pytest.mark.parametrize("name", [*METHODS, "lora"])
def test_every_method_is_scored_by_sets_of_labels(world: World, name: str) -> None:
    assert outcome(world.root / name) == {}
    manifest = AdaptedWeights(world.root / name).manifest
    assert (manifest.task["problem"], tuple(manifest.task["labels"])) == ("multi_label", LABELS)
    for split in ("dev", "test"):
        assert manifest.metrics[split].keys() == SCORES
        assert all(0 <= score <= 1 for score in manifest.metrics[split].values())


def test_a_cached_teacher_says_what_an_online_one_does(world: World) -> None:
    cached, online = (scalars(world.root / name, "train/loss") for name in ("distill", "online"))
    assert cached == pytest.approx(online, rel=1e-5)


def test_the_likeliest_labels_alone_are_refused(world: World) -> None:
    told = outcome(world.root / "top")
    assert told["error"] == "InputError" and not (world.root / "top" / "run.json").exists()
    assert "teacher_top_k: is 2, expected null: in multi_label no label makes another impossible" in told["message"]


def told(capsys: pytest.CaptureFixture, *argv: object) -> dict[str, Any]:
    """The JSON object that `recyclable argv` ends with; it must succeed."""
    capsys.readouterr()
    assert main([*map(str, argv), "--json"]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_evaluate_and_probe_know_the_kind(world: World, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    weights = ("--weights", world.root / "full", "--task", world.task)
    (row,) = told(capsys, "evaluate", *weights, "--base", world.base)["runs"]
    assert {n: row[f"test_{n}"] for n in SCORES} == pytest.approx(read_manifest(world.root / "full").metrics["test"])
    found = told(capsys, "probe", *weights, "--base", world.upgraded, "--points", 3, "--out", tmp_path / "out")
    evidence = found["evidence"]["compatibility"]
    assert evidence["metric"] == "f1_micro" and "chance" not in evidence
    assert evidence["old"].keys() == evidence["majority"].keys() == SCORES | {"loss"}
    assert evidence["old"]["loss"] < evidence["majority"]["loss"]
    assert (tmp_path / "out" / "report.html").is_file()


def test_the_store_ranks_entries_and_exports_a_model_of_several_labels(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for name in ("full", "lora"):
        told(capsys, "store", "add", "--tuned", world.root / name, "--base", world.base, "--name", name)
    ranked = told(capsys, "store", "similar", "--task", world.task, "--base", world.upgraded)["entries"]
    assert {row["name"] for row in ranked} == {"full", "lora", "(the base alone)"}
    assert all(0 <= row["f1_micro"] <= 1 for row in ranked) and ranked[0]["f1_micro"] > 0.5
    told(capsys, "store", "export", "full", "--merged", "--base", world.base, "--out", tmp_path / "out")
    test = load_task(world.task).splits["test"].take(range(6))
    with torch.no_grad():
        logits = with_weights(world.base, world.root / "full")(**encoded(world, test.texts, test.labels)).logits
    tokenizer = AutoTokenizer.from_pretrained(world.base)
    answers = pipeline("text-classification", model=str(tmp_path / "out"), tokenizer=tokenizer, top_k=None)(test.texts)
    for row, wanted in zip(answers, logits.sigmoid().tolist(), strict=True):
        assert {one["label"]: one["score"] for one in row} == pytest.approx(
            dict(zip(LABELS, wanted, strict=True)), rel=1e-4
        )


def test_what_others_tuned_is_scored_in_the_order_of_its_own_head(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    order = [2, 0, 1]
    model = with_weights(world.base, world.root / "full")
    with torch.no_grad():
        for parameter in model.classifier.parameters():
            parameter.copy_(parameter[order])
    model.config.id2label = {row: LABELS[label] for row, label in enumerate(order)}
    model.config.label2id = {name: row for row, name in model.config.id2label.items()}
    model.save_pretrained(tmp_path / "theirs")
    AutoTokenizer.from_pretrained(world.base).save_pretrained(tmp_path / "theirs")
    store = ("--store", tmp_path / "store")
    add = (
        "store",
        "add",
        "--tuned",
        tmp_path / "theirs",
        "--base",
        world.base,
        "--name",
        "theirs",
        "--max-length",
        LENGTH,
    )
    told(capsys, *add, "--task", world.task, *store)
    shown = told(capsys, "store", "show", "theirs", *store)
    assert (shown["problem"], shown["labels"]) == ("multi_label", [LABELS[i] for i in order])
    argv = ("evaluate", "--weights", "theirs", "--base", world.base, "--task", world.task, *store)
    (row,) = told(capsys, *argv)["runs"]
    wanted = read_manifest(world.root / "full").metrics["test"]
    assert {n: row[f"test_{n}"] for n in SCORES} == pytest.approx(wanted)


def test_the_kind_is_listed(capsys: pytest.CaptureFixture) -> None:
    (listed,) = told(capsys, "tasks", "multi_label")["tasks"]
    assert (listed["name"], listed["from"]) == ("multi_label", "recyclable")
