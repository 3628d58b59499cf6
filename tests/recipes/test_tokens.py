"""Tags per word through every verb: tuned, recycled by every method, evaluated, probed, stored, opened elsewhere."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from families import config, drawn
from peft import LoraConfig, PeftModel, get_peft_model
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
from tagging import conlleval, plain_batch
from torch import nn
from transformers import AutoModelForTokenClassification, AutoTokenizer, BertForTokenClassification, pipeline
from worlds import (
    make_base,
    make_model,
    make_outdated,
    make_tagged_task,
    make_task,
    make_tokenizer,
    make_upgraded,
    write_config,
)

from recyclable import carry, teacher_loss
from recyclable.carrying.carried import Carried
from recyclable.cli import main
from recyclable.data.order import Order
from recyclable.models.tasks import outdated_model, task_model
from recyclable.tasks.parts.task import load_task
from recyclable.weights.adapted import AdaptedWeights
from recyclable.weights.base import Base
from recyclable.weights.manifest import read_manifest
from recyclable.weights.sources import fill
from recyclable.weights.store import VARIABLE, Store

STEPS, WARMUP, RATE = 10, 2, 2e-2
TRAINED = {**COMMON, "max_steps": STEPS, "warmup_steps": WARMUP, "eval_every": STEPS, "learning_rate": RATE}
UNTRAINED = {name: COMMON[name] for name in ("seed", "max_length", "eval_batch_size")}
NER = ("O", "B-LOC", "B-PER", "I-LOC", "I-PER")
SCORES = {"precision", "recall", "f1", "accuracy", "f1_macro"}
DISTILLED = {"alpha": ALPHA, "beta": BETA, "temperature": TEMPERATURE}
METHODS: dict[str, dict[str, Any]] = {
    "scratch": {},
    "init": {},
    "distill": {"teacher": "cached", **DISTILLED},
    "online": {"method": "distill", "teacher": "online", **DISTILLED},
    "both": {"teacher": "online", **DISTILLED},
    "interpolate": {"interpolation_points": [0.5]},
    "apply": {},
    "auto": {"method": "apply", "scale": "auto", "strength_examples": 20},
    "project": {"strength_examples": 20},
}


class World:
    """A base, its upgrade, two tagged tasks, and what training made of them; made on first use, kept for all tests."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.base = make_base(root / "base")
        self.upgraded = make_upgraded(self.base, root / "upgraded")
        self.task = make_tagged_task(root / "task")
        self.other = make_tagged_task(root / "other", types=("ORG", "PER"), seed=8)
        self.pairs = [[str(root / "known-old"), str(root / "known-new")]]

    def tune(self, name: str, **changed: Any) -> dict[str, Any]:
        settings = {"base": self.base, "task": str(self.task), **TRAINED, "out": self.root / name, **changed}
        return {"verb": "tune", "config": settings, "ds_config": {"train_micro_batch_size_per_gpu": 4}}

    def recycle(self, name: str, weights: str | Path, **changed: Any) -> dict[str, Any]:
        method = changed.get("method", name)
        shared = {"base": self.upgraded, "old_base": self.base, "weights": self.root / weights, "task": str(self.task)}
        trains = method not in ("apply", "project")
        known = {"project_from": self.pairs} if method == "project" else {}
        settings = {**shared, **(TRAINED if trains else UNTRAINED), "method": method, "out": self.root / name}
        ds_config = {"train_micro_batch_size_per_gpu": 12} if trains else {}
        return {"verb": "recycle", "config": {**settings, **known, **changed}, "ds_config": ds_config}

    def runs(self) -> list[dict[str, Any]]:
        """What one process does."""
        known = {"task": str(self.other), "max_steps": 4, "eval_every": 4, "shots": 8}
        return [
            self.tune("full"),
            self.tune("lora", tuning="lora", lora_r=4),
            self.tune("bottleneck", tuning="bottleneck", bottleneck_size=4),
            self.tune("known-old", **known),
            self.tune("known-new", base=self.upgraded, **known),
            *(self.recycle(name, "full", **settings) for name, settings in METHODS.items()),
            self.recycle("lora-both", "lora", method="both"),
            self.recycle("lora-auto", "lora", method="apply", scale="auto", strength_examples=20),
            self.recycle("bottleneck-init", "bottleneck", method="init"),
            self.recycle("related", "full", method="both", task=str(self.other), related_task=True),
            self.recycle("unrelated", "full", method="init", task=str(self.other)),
        ]

    def runs_on_two_ranks(self) -> list[dict[str, Any]]:
        sharded = {"train_micro_batch_size_per_gpu": 3, "zero_optimization": {"stage": 3, **STAGE_3}}
        return [{**self.tune("full-on-two"), "ds_config": sharded}]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    world = World(tmp_path_factory.mktemp("tokens"))
    runs = {"one": (world.runs(), None), "two": (world.runs_on_two_ranks(), 2)}
    started = {name: start(world.root / name, of, nproc=ranks) for name, (of, ranks) in runs.items()}
    for name, process in started.items():
        finish(process, world.root / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, str(world.root / "store"))
        yield world


def run(capsys: pytest.CaptureFixture, *argv: object) -> dict[str, Any]:
    """The JSON object that `recyclable argv` ends with; it must succeed."""
    capsys.readouterr()
    status = main([*map(str, argv), "--json"])
    said = capsys.readouterr()
    assert status == 0, said.err
    return json.loads(said.out.splitlines()[-1])


def refused(capsys: pytest.CaptureFixture, *argv: object) -> str:
    """The one line that `recyclable argv` says when it refuses."""
    capsys.readouterr()
    status = main([*map(str, argv)])
    lines = capsys.readouterr().err.strip().splitlines()
    assert (status, len(lines)) == (2, 1), lines
    return lines[0]


# ---- plain PyTorch


def tagger(base: Path, task: Path) -> BertForTokenClassification:
    """A base with the head that the package draws."""
    labelled = load_task(task)
    model = BertForTokenClassification.from_pretrained(base, num_labels=len(labelled.labels))
    model.load_state_dict(fill(task_model(Base(base), labelled, SEED)).state_dict())
    return model.eval()


def with_weights(base: Path, weights: Path) -> BertForTokenClassification:
    """base + difference, and the head."""
    delta, head = load_file(weights / "delta.safetensors"), load_file(weights / "head.safetensors")
    model = BertForTokenClassification.from_pretrained(base, num_labels=len(NER))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            name = name.removeprefix("bert.")
            parameter.copy_(parameter + delta[name] if name in delta else head[name])
    return model.eval()


def split_of(task: Path, split: str, base: Path, length: int = LENGTH) -> dict[str, torch.Tensor]:
    of = load_task(task).splits[split]
    return plain_batch(AutoTokenizer.from_pretrained(base), of.texts, of.labels, length)


def plain_scores(model: nn.Module, task: Path, split: str, base: Path, length: int = LENGTH) -> dict[str, float]:
    """Entities and words right, those beyond the end told to be O."""
    labelled, batch = load_task(task), split_of(task, split, base, length)
    names, labels, wanted, found = labelled.labels, batch.pop("labels"), [], []
    with torch.no_grad():
        told = model(**batch).logits.argmax(-1)
    for true, asked, row in zip(labelled.splits[split].labels, labels, told, strict=True):
        seen = [names[i] for i in row[asked != -100]]
        wanted.append([names[i] for i in true])
        found.append(seen + ["O"] * (len(true) - len(seen)))
    pairs = [(a, b) for of in zip(wanted, found, strict=True) for a, b in zip(*of, strict=True)]
    return {**conlleval(wanted, found), "accuracy": sum(a == b for a, b in pairs) / len(pairs)}


def batches_of(world: World) -> Callable[[int], dict[str, torch.Tensor]]:
    """Each step's batch, made by hand."""
    train, tokenizer = load_task(world.task).splits["train"], AutoTokenizer.from_pretrained(world.base)
    order = Order(len(train), BATCH, SEED)

    def of(step: int) -> dict[str, torch.Tensor]:
        rows = train.take(index for _, index in order.step(step))
        return plain_batch(tokenizer, rows.texts, rows.labels, LENGTH)

    return of


def trained_plainly(model: nn.Module, loss_of: Callable[[int], torch.Tensor]) -> list[float]:
    return plain_training(model, [name for name, _ in model.named_parameters()], loss_of, RATE, WARMUP, STEPS)


@pytest.fixture(scope="module")
def tuned_plainly(world: World) -> tuple[nn.Module, list[float]]:
    model, batch = tagger(world.base, world.task), batches_of(world)
    return model, trained_plainly(model, lambda step: model(**batch(step)).loss)


def require_same(world: World, name: str, base: Path, expected: tuple[nn.Module, list[float]]) -> None:
    """The run's losses, weights and test scores are those of the plain model."""
    model, losses = expected
    assert outcome(world.root / name) == {}
    assert scalars(world.root / name, "train/loss") == pytest.approx(losses, rel=LOSS_TOLERANCE)
    tensors = short(dict(model.named_parameters()))
    assert largest_difference(saved_tensors(world.root / name, base), tensors) <= WEIGHT_TOLERANCE
    metrics = read_manifest(world.root / name).metrics
    assert metrics["metric"] == "f1" and metrics["best_step"] == STEPS, "the oracle has the weights of the last step"
    wanted = plain_scores(model, world.task, "test", base)
    assert {key: metrics["test"][key] for key in wanted} == pytest.approx(wanted)


@pytest.mark.parametrize("name", ["full", "full-on-two"])
def test_tuning_is_that_of_plain_transformers(world: World, tuned_plainly, name: str) -> None:
    require_same(world, name, world.base, tuned_plainly)
    losses = tuned_plainly[1]
    assert losses[-1] < 0.7 * losses[0] and read_manifest(world.root / name).metrics["test"]["f1"] > 0.3


def test_recycling_with_a_teacher_is_that_of_plain_transformers_over_words(world: World) -> None:
    teacher = with_weights(world.base, world.root / "full").requires_grad_(False)
    student, batch_of = with_weights(world.upgraded, world.root / "full"), batches_of(world)

    def loss_of(step: int) -> torch.Tensor:
        batch = batch_of(step)
        s, t = (model(**batch, output_hidden_states=True) for model in (student, teacher))
        asked = batch["labels"] != -100
        p, q = ((of.logits[asked] / TEMPERATURE).softmax(-1) for of in (t, s))
        kl = (p * (p / q).log()).sum() / asked.sum()
        patient = 0.5 * nn.functional.mse_loss(
            *(torch.stack([h[:, 0] for h in of.hidden_states[:-1]]) for of in (s, t))
        )
        return (1 - ALPHA) * s.loss + ALPHA * TEMPERATURE**2 * kl + BETA * patient

    require_same(world, "both", world.upgraded, (student, trained_plainly(student, loss_of)))


# ---- every method and tuning


@pytest.mark.parametrize("name", [*METHODS, "lora", "bottleneck", "lora-both", "lora-auto", "bottleneck-init"])
def test_every_tuning_and_method_is_scored_by_entity_f1(world: World, name: str) -> None:
    assert outcome(world.root / name) == {}
    manifest = AdaptedWeights(world.root / name).manifest
    assert (manifest.task["problem"], tuple(manifest.task["labels"])) == ("tokens", NER)
    assert manifest.metrics["metric"] == "f1"
    for split in ("dev", "test"):
        assert manifest.metrics[split].keys() == SCORES
        assert all(0 <= score <= 1 for score in manifest.metrics[split].values())


def test_a_cached_teacher_says_what_an_online_one_does(world: World) -> None:
    cached, online = (scalars(world.root / name, "train/loss") for name in ("distill", "online"))
    assert cached == pytest.approx(online, rel=1e-5)


def test_a_strength_is_found_on_words(world: World) -> None:
    for name in ("auto", "lora-auto", "project"):
        found = read_manifest(world.root / name).recycled_from["strength"]
        assert found["examples"] == 20
        assert found["loss"] <= min(found["loss_by_common_strength"].values())
        assert len(set(found["loss_by_common_strength"].values())) > 1


def test_weights_of_other_tags_start_a_task_with_a_fresh_head_where_that_is_allowed(world: World) -> None:
    manifest = read_manifest(world.root / "related")
    assert manifest.task["labels"] == ["O", "B-ORG", "B-PER", "I-ORG", "I-PER"]
    assert manifest.recycled_from["labels"] == list(NER) and not manifest.recycled_from["same_labels"]
    assert manifest.metrics["test"].keys() == SCORES
    told = outcome(world.root / "unrelated")
    assert told["error"] == "InputError" and "related_task=true recycles all but the head" in told["message"]


def test_weights_of_another_kind_of_task_are_refused_in_one_line_both_ways(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    texts = make_task(tmp_path / "texts", train=12, dev=6, test=6)
    of_texts, of_words = make_outdated(world.base, texts, tmp_path / "of-texts"), world.root / "full"
    for weights, task, line in (
        (of_texts, world.task, "was tuned for classification, the task task is tokens"),
        (of_words, texts, "was tuned for tokens, the task texts is classification"),
    ):
        assert line in refused(capsys, "evaluate", "--weights", weights, "--base", world.base, "--task", task)
        assert line in refused(capsys, "probe", "--weights", weights, "--base", world.upgraded, "--task", task)
        settings = world.recycle("init", weights, task=str(task), out=tmp_path / "out")["config"]
        assert line in refused(capsys, "recycle", write_config(tmp_path / "run.yaml", settings))
        settings["related_task"] = True
        refused(capsys, "recycle", write_config(tmp_path / "run.yaml", settings))
        assert not (tmp_path / "out").exists()


# ---- evaluate, probe


def test_evaluate_gives_the_scores_that_were_recorded(world: World, capsys: pytest.CaptureFixture) -> None:
    for base, weights, measured in (
        (world.base, ("full", "lora"), ("full", "lora")),
        (world.upgraded, ("full", "both"), ("apply", "both")),
    ):
        folders = [world.root / name for name in weights]
        rows = run(capsys, "evaluate", "--weights", *folders, "--base", base, "--task", world.task)["runs"]
        for row, name in zip(rows, measured, strict=True):
            recorded = read_manifest(world.root / name).metrics["test"]
            assert {score: row[f"test_{score}"] for score in SCORES} == pytest.approx(recorded)


def test_probe_walks_the_path_on_words(world: World, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    argv = ("probe", "--weights", world.root / "full", "--base", world.upgraded, "--task", world.task)
    found = run(capsys, *argv, "--points", 3, "--out", tmp_path / "probe")
    told = found["evidence"]["compatibility"]
    assert (told["metric"], told["examples"]) == ("f1", 30)
    for when, base in (("old", world.base), ("new", world.upgraded)):
        model = with_weights(base, world.root / "full")
        wanted = plain_scores(model, world.task, "dev", base)
        with torch.no_grad():
            wanted["loss"] = model(**split_of(world.task, "dev", base)).loss.item()
        assert {key: told[when][key] for key in wanted} == pytest.approx(wanted, rel=1e-4)
    assert told["majority"]["f1"] == 0 and 0.3 < told["majority"]["accuracy"] < told["old"]["accuracy"]
    path = found["evidence"]["connectivity"]
    assert [path["metric"][i] for i in (0, -1)] == pytest.approx([told[when]["f1"] for when in ("old", "new")])
    assert len(found["evidence"]["similarity"]["cka"]) == 3
    assert "f1" in (tmp_path / "probe" / "report.html").read_text()


def test_from_python_words_are_distilled_with_labels_per_piece(world: World) -> None:
    batch, weights = split_of(world.task, "test", world.base), world.root / "full"
    student = carry(weights, to=world.upgraded)
    loss = teacher_loss(student, weights, batch, temperature=TEMPERATURE)
    asked, models = batch["labels"] != -100, (with_weights(base, weights) for base in (world.base, world.upgraded))
    with torch.no_grad():
        p, q = ((model(**batch).logits[asked] / TEMPERATURE).softmax(-1) for model in models)
    assert loss.item() == pytest.approx((TEMPERATURE**2 * (p * (p / q).log()).sum() / asked.sum()).item(), rel=1e-4)


# ---- the store


@pytest.fixture(scope="module")
def elsewhere(world: World) -> dict[str, torch.Tensor]:
    """What others tuned on the base with plain transformers and peft; name -> the logits on test."""
    batch = split_of(world.task, "test", world.base)
    batch.pop("labels")
    found = {}
    for name in ("theirs", "theirs-lora"):
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            model: Any = BertForTokenClassification.from_pretrained(world.base, num_labels=len(NER))
            if name == "theirs-lora":
                model = get_peft_model(model, LoraConfig(task_type="TOKEN_CLS", r=3, target_modules=["query", "value"]))
            for parameter in model.parameters():
                parameter += 0.05 * torch.randn_like(parameter) * parameter.requires_grad
            found[name] = model.eval()(**batch).logits
        model.save_pretrained(world.root / name)
    make_tokenizer().save_pretrained(world.root / "theirs")
    return found


@pytest.fixture(scope="module")
def stored(world: World, elsewhere) -> Store:
    """Our runs and what others tuned, by name."""
    for name in ("full", "lora", "bottleneck", *elsewhere):
        argv = ("store", "add", "--tuned", world.root / name, "--base", world.base, "--name", name)
        named = ("--labels", ",".join(NER)) if name in elsewhere else ()
        assert main([*map(str, argv), "--task", str(world.task), *named]) == 0
    return Store()


def our_logits(world: World, weights: Path, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    opened = Base(world.base)
    carried = Carried(AdaptedWeights(weights), opened, opened)
    with torch.no_grad():
        return fill(outdated_model(carried, load_task(world.task), SEED)).eval()(**batch).logits


@pytest.mark.parametrize("name", ["full", "lora", "theirs", "theirs-lora"])
def test_an_entry_opens_elsewhere_with_the_same_logits(
    world: World, stored: Store, elsewhere, tmp_path: Path, capsys: pytest.CaptureFixture, name: str
) -> None:
    batch = split_of(world.task, "test", world.base)
    batch.pop("labels")
    wanted = our_logits(world, stored.path(name), batch)
    if name in elsewhere:
        torch.testing.assert_close(wanted, elsewhere[name])
    export = ("store", "export", name, "--base", world.base)
    run(capsys, *export, "--merged", "--out", tmp_path / "merged")
    model, info = AutoModelForTokenClassification.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert tuple(model.config.id2label[i] for i in range(len(NER))) == NER
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(**batch).logits, wanted, rtol=1e-4, atol=1e-5)
    tag = pipeline("token-classification", str(tmp_path / "merged"))
    words = next(of for of in load_task(world.task).splits["test"].texts if not any("-" in word for word in of))
    told = [each["entity"] for each in tag(" ".join(words), ignore_labels=[])]
    plain = plain_batch(tag.tokenizer, [words], [[0] * len(words)], 64)
    assert told == [NER[i] for i in model(**plain).logits[plain["labels"] != -100].argmax(-1)]
    if "lora" not in name:
        assert "is a delta of all weights" in refused(capsys, *export, "--peft", "--out", tmp_path / "peft")
        return
    run(capsys, *export, "--peft", "--out", tmp_path / "peft")
    plain_model = BertForTokenClassification.from_pretrained(world.base, num_labels=len(NER))
    with torch.no_grad():
        peft = PeftModel.from_pretrained(plain_model, tmp_path / "peft").eval()
        torch.testing.assert_close(peft(**batch).logits, wanted)


def test_what_others_tuned_is_evaluated_and_recycled_by_name(
    world: World, stored: Store, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    names = ("theirs", "theirs-lora")
    argv = ("evaluate", "--weights", *names, "--base", world.base, "--task", world.task)
    rows = run(capsys, *argv)["runs"]
    model = BertForTokenClassification.from_pretrained(world.root / "theirs").eval()
    wanted = plain_scores(model, world.task, "test", world.base, 64)  # as long as the base has positions
    assert {score: rows[0][f"test_{score}"] for score in wanted} == pytest.approx(wanted)
    for name in names:
        settings = world.recycle("apply", stored.path(name), out=tmp_path / name)["config"]
        settings["weights"] = name
        assert main(["recycle", str(write_config(tmp_path / "run.yaml", settings))]) == 0
        assert read_manifest(tmp_path / name).metrics["test"].keys() == SCORES


def test_the_store_lists_shows_and_ranks_entries(world: World, stored: Store, capsys: pytest.CaptureFixture) -> None:
    rows = {row["name"]: row for row in run(capsys, "store", "ls")["entries"]}
    names = {"full", "lora", "bottleneck", "theirs", "theirs-lora"}
    assert rows.keys() == names and {row["task"] for row in rows.values()} == {"task"}
    assert rows["full"]["score"] == read_manifest(world.root / "full").metrics["test"]["f1"]
    for name in names:
        shown = run(capsys, "store", "show", name)
        assert (shown["problem"], tuple(shown["labels"])) == ("tokens", NER)
    argv = ("store", "similar", "--task", world.task, "--base", world.upgraded, "--examples", 60)
    ranked = run(capsys, *argv)["entries"]
    assert {row["name"] for row in ranked} == names | {"(the base alone)"}
    assert all(0 <= row["f1"] <= 1 and row["logme"] == row["logme"] for row in ranked)
    assert ranked[0]["f1"] > 0.3


def test_what_comes_in_is_of_the_kind_that_its_class_or_task_type_says(
    world: World, stored: Store, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    texts = make_task(tmp_path / "texts", train=12, dev=6, test=6)
    for name in ("theirs", "theirs-lora"):
        add = ("store", "add", "--tuned", world.root / name, "--base", world.base, "--name", f"{name}-unnamed")
        said = refused(capsys, *add, "--task", texts)
        assert "--task: texts is classification, the weights are of a model for tokens" in said
        shown = run(capsys, *add, "--store", tmp_path / "store")
        assert (shown["problem"], shown["labels"]) == ("tokens", [f"LABEL_{i}" for i in range(len(NER))])
    config = world.root / "theirs" / "config.json"
    before = config.read_text()
    try:  # a checkpoint that does not say what it is, is what its task says
        config.write_text(json.dumps({**json.loads(before), "architectures": None}))
        argv = ("store", "add", "--tuned", world.root / "theirs", "--base", world.base, "--name", "silent")
        named = ("--labels", ",".join(NER))
        shown = run(capsys, *argv, "--task", world.task, "--store", tmp_path / "store", *named)
        assert (shown["problem"], tuple(shown["labels"])) == ("tokens", NER)
    finally:
        config.write_text(before)


def test_the_kind_is_listed_with_the_columns_it_reads(capsys: pytest.CaptureFixture) -> None:
    (listed,) = run(capsys, "tasks", "tokens")["tasks"]
    assert (listed["name"], listed["from"]) == ("tokens", "recyclable")
    assert {setting["name"]: setting["default"] for setting in listed["settings"]} == {
        "text": "tokens",
        "label": "tags",
    }


def test_a_decoder_that_the_task_has_no_place_for_stays_behind(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base", drawn(config("t5", vocab_size=200)))
    task, weights = make_tagged_task(tmp_path / "task"), tmp_path / "tuned"
    once = {"max_steps": 1, "eval_every": 1, "warmup_steps": 0}
    places = {"base": str(base), "task": str(task), "out": str(weights)}
    run = write_config(tmp_path / "tune.yaml", {**TRAINED, **once, **places})
    assert main(["tune", str(run)]) == 0
    assert main(["apply", "--weights", str(weights), "--base", str(base), "--out", str(tmp_path / "whole")]) == 0
    ours = carry(weights, to=base)
    theirs = AutoModelForTokenClassification.from_pretrained(tmp_path / "whole")
    assert not any("decoder" in name for name, _ in theirs.named_parameters())
    ids = torch.arange(5, 25)[None]
    torch.testing.assert_close(theirs(input_ids=ids).logits, ours(input_ids=ids).logits)
