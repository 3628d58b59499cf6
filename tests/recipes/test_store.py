"""`recyclable store`: what comes in goes out bit for bit and opens elsewhere; bad input of every kind is one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import malformed
import pytest
import torch
from peft import IA3Config, LoHaConfig, LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from store_safety import INDEX, MODEL, flips, fuzz
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    BertForSequenceClassification,
)
from worlds import LABELS, make_base, make_outdated, make_task, make_tokenizer, make_upgraded

from recyclable.carrying.carried import Carried
from recyclable.cli import main
from recyclable.models.tasks import outdated_model
from recyclable.tasks.parts.task import load_task
from recyclable.weights.adapted import AdaptedWeights
from recyclable.weights.base import Base
from recyclable.weights.fingerprint import fingerprint
from recyclable.weights.manifest import ADAPTER, ADAPTER_CONFIG
from recyclable.weights.sources import fill
from recyclable.weights.store import VARIABLE, Store

IDS = torch.randint(5, 190, (4, 12), generator=torch.Generator().manual_seed(0))
PEFT_KINDS = {
    "lora": LoraConfig(task_type="SEQ_CLS", r=3, target_modules=["query", "dense"], use_rslora=True),
    "dora": LoraConfig(task_type="SEQ_CLS", r=2, target_modules=r".*\.(query|value)", use_dora=True),
    "ia3": IA3Config(task_type="SEQ_CLS", target_modules=["key", "value"], feedforward_modules=[]),
    "loha": LoHaConfig(task_type="SEQ_CLS", r=2, target_modules=["query"], modules_to_save=["classifier", "LayerNorm"]),
    "prefix": PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3),
}
NAMED = ("--labels", ",".join(LABELS))
MERGED = ("lora", "dora", "ia3", "loha")


class World:
    """A base with a pooler, its upgrade, a task, and what others tuned on the base."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.base = make_base(root / "base", mlm_head=False)
        self.headless = make_base(root / "headless", mlm_head=True)  # and without a pooler
        self.upgraded = make_upgraded(self.base, root / "upgraded")
        self.task = make_task(root / "task", train=30, dev=12, test=12)
        self.run = make_outdated(self.base, self.task, root / "run")
        for dtype in ("float32", "bfloat16", "float16"):
            self._tune(dtype)
        self.logits = {kind: self._adapt(kind) for kind in PEFT_KINDS}

    def _tune(self, dtype: str) -> None:
        torch.manual_seed(0)
        model = self.plain(self.base, dtype=getattr(torch, dtype))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.02 * torch.randn_like(parameter)
        model.save_pretrained(self.root / dtype, max_shard_size="20KB" if dtype == "float16" else "1GB")
        make_tokenizer().save_pretrained(self.root / dtype)

    def _adapt(self, kind: str) -> torch.Tensor:
        torch.manual_seed(0)
        model = get_peft_model(self.plain(self.base), PEFT_KINDS[kind]).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn_like(parameter) * parameter.requires_grad
            logits = model(input_ids=IDS).logits
        model.save_pretrained(self.root / kind)
        return logits

    @staticmethod
    def plain(base: Path, **options: Any) -> BertForSequenceClassification:
        return BertForSequenceClassification.from_pretrained(base, num_labels=3, **options)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("store"))


class Runs:
    """Runs the command in this process, with a store of its own."""

    def __init__(self, world: World, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
        self.world, self.tmp, self.capsys = world, tmp_path, capsys

    def run(self, *argv: object) -> str:
        """What `recyclable argv` prints; it must succeed."""
        self.capsys.readouterr()
        status = main([str(argument) for argument in argv])
        captured = self.capsys.readouterr()
        assert status == 0, captured.err
        return captured.out

    def refused(self, *argv: object) -> str:
        """The one line that `recyclable argv` says when it refuses; no file changes."""
        before = sorted(self.tmp.rglob("*"))
        self.capsys.readouterr()
        status = main([str(argument) for argument in argv])
        lines = self.capsys.readouterr().err.strip().splitlines()
        assert (status, len(lines)) == (2, 1), lines
        assert sorted(self.tmp.rglob("*")) == before
        return lines[0]

    def add(self, tuned: Path, name: str = "n", *options: object) -> str:
        return self.run("store", "add", "--tuned", tuned, "--base", self.world.base, "--name", name, *options)

    def not_added(self, tuned: Path, *options: object, base: Path | None = None) -> str:
        base = base or self.world.base
        return self.refused("store", "add", "--tuned", tuned, "--base", base, "--name", "n", *options)

    def json(self, *argv: object) -> dict[str, Any]:
        return json.loads(self.run(*argv, "--json").splitlines()[-1])

    def copy(self, folder: Path) -> Path:
        return Path(shutil.copytree(folder, self.tmp / "copy"))


@pytest.fixture
def runs(world: World, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Runs:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "store"))
    return Runs(world, tmp_path, capsys)


def rewrite(path: Path, **changed: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for file in folder.glob("model*.safetensors") for n, t in load_file(file).items()}


# ---- round trips


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_checkpoint_comes_back_bit_for_bit(runs: Runs, dtype: str) -> None:
    tuned = runs.world.root / dtype
    runs.add(tuned, "n", "--task", runs.world.task, *NAMED)
    runs.run("store", "export", "n", "--merged", "--base", runs.world.base, "--out", runs.tmp / "out")
    before, after = tensors(tuned), tensors(runs.tmp / "out")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype and torch.equal(after[name], tensor), name
    model = AutoModelForSequenceClassification.from_pretrained(runs.tmp / "out")
    assert type(model) is BertForSequenceClassification
    assert list(model.config.id2label.values()) == list(LABELS)
    assert AutoTokenizer.from_pretrained(runs.tmp / "out").get_vocab() == make_tokenizer().get_vocab()
    assert (tuned / INDEX).is_file() == (dtype == "float16"), "one of them is sharded"


def test_on_an_upgrade_the_difference_is_added(runs: Runs) -> None:
    runs.add(runs.world.root / "float32")
    runs.run("store", "export", "n", "--merged", "--base", runs.world.upgraded, "--out", runs.tmp / "out")
    tuned, merged = tensors(runs.world.root / "float32"), tensors(runs.tmp / "out")
    old, new = Base(runs.world.base), Base(runs.world.upgraded)
    for name in old.names:
        want = new[name] + (tuned[f"bert.{name}"] - old[name])
        torch.testing.assert_close(merged[f"bert.{name}"], want, rtol=0, atol=1e-6)
    assert torch.equal(merged["classifier.weight"], tuned["classifier.weight"])


def test_the_architecture_is_kept(runs: Runs) -> None:
    torch.manual_seed(0)
    model = AutoModelForTokenClassification.from_pretrained(runs.world.base, num_labels=5)
    model.save_pretrained(runs.tmp / "tagger")
    runs.add(runs.tmp / "tagger")
    runs.run("store", "export", "n", "--merged", "--base", runs.world.base, "--out", runs.tmp / "out")
    again, info = AutoModelForTokenClassification.from_pretrained(runs.tmp / "out", output_loading_info=True)
    assert not info["missing_keys"] and again.config.architectures == ["BertForTokenClassification"]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    said = runs.refused("evaluate", "--weights", "n", "--base", runs.world.base, "--task", runs.world.task)
    assert "n: was tuned for tokens, the task task is classification" in said


@pytest.mark.parametrize("kind", PEFT_KINDS)
def test_an_adapter_opens_in_plain_peft_with_the_same_logits(runs: Runs, kind: str) -> None:
    world, want = runs.world, runs.world.logits[kind]
    runs.add(world.root / kind, "n", "--task", world.task, *NAMED)
    runs.run("store", "export", "n", "--peft", "--base", world.base, "--out", runs.tmp / "out")
    plain = PeftModel.from_pretrained(world.plain(world.base), runs.tmp / "out").eval()
    weights, opened = AdaptedWeights(Store().path("n")), Base(world.base)
    ours = fill(outdated_model(Carried(weights, opened, opened), load_task(world.task), seed=1))
    with torch.no_grad():
        assert torch.equal(plain(input_ids=IDS).logits, want)
        torch.testing.assert_close(ours(input_ids=IDS).logits, want)
    export = ("store", "export", "n", "--merged", "--base", world.base, "--out", runs.tmp / "merged")
    if kind not in MERGED:
        assert "cannot fold this kind of adapter" in runs.refused(*export)
        return
    runs.run(*export)
    merged = BertForSequenceClassification.from_pretrained(runs.tmp / "merged").eval()
    with torch.no_grad():
        torch.testing.assert_close(merged(input_ids=IDS).logits, want)


def test_an_imported_adapter_is_recycled_by_training(runs: Runs) -> None:
    world = runs.world
    runs.add(world.root / "dora", "n", "--task", world.task, *NAMED)
    settings = {
        "method": "distill",  # the teacher has the imported weights, the student a fresh adapter like it
        "base": world.upgraded,
        "old_base": world.base,
        "weights": "n",
        "task": world.task,
        "out": runs.tmp / "recycled",
        "max_steps": 2,
        "learning_rate": 1e-3,
        "train_batch_size": 4,
        "max_length": 24,
        "save_every": 0,
    }
    (runs.tmp / "run.yaml").write_text("".join(f"{key}: {value}\n" for key, value in settings.items()))
    runs.run("recycle", runs.tmp / "run.yaml")
    config = json.loads((runs.tmp / "recycled" / ADAPTER_CONFIG).read_text())
    assert config["use_dora"] and config["r"] == 2
    before, after = (load_file(f / ADAPTER) for f in (world.root / "dora", runs.tmp / "recycled"))
    assert {n: t.shape for n, t in before.items()} == {n: t.shape for n, t in after.items()}
    assert not any(torch.equal(before[n], after[n]) for n in before if "lora_A" in n)
    runs.run("store", "add", "--tuned", runs.tmp / "recycled", "--name", "again")
    assert runs.json("store", "show", "again")["recycled_from"]["task"] == "task"


def test_a_run_comes_in_as_it_is_or_with_another_codec(runs: Runs) -> None:
    world = runs.world
    runs.run("store", "add", "--tuned", world.run, "--name", "kept")
    assert Store().damage("kept") == []
    assert vars(AdaptedWeights(Store().path("kept")).manifest) == vars(AdaptedWeights(world.run).manifest)
    runs.add(world.run, "small", "--codec", "lowrank", "--rank", "2")
    kept, small = runs.json("store", "show", "kept"), runs.json("store", "show", "small")
    assert small["codec"] == "lowrank 2" and small["mb"] < 0.6 * kept["mb"]
    assert 0.1 < small["loss"]["difference"] < 1 and small["loss"]["weights"] < small["loss"]["difference"]
    assert "--base: is missing" in runs.refused("store", "add", "--tuned", world.run, "--name", "x", "--codec", "1bit")


# ---- what is shown


def test_tables_and_json_say_what_is_there(runs: Runs) -> None:
    world = runs.world
    assert "is empty" in runs.run("store", "ls") and runs.json("store", "ls")["entries"] == []
    runs.add(world.root / "float32", "full", "--codec", "1bit")
    runs.add(world.root / "lora", "lora")
    rows = runs.json("store", "ls")["entries"]
    assert [(row["name"], row["tuning"], row["codec"]) for row in rows] == [
        ("full", "full", "1bit"),
        ("lora", "lora", None),
    ]
    shown = runs.json("store", "show", "full", "--base", world.upgraded)
    stranger = make_base(runs.tmp / "stranger", seed=9)
    assert runs.json("store", "show", "full", "--base", stranger)["relation"] is None
    assert f"{'relation':14}none: {stranger} does not" in runs.run("store", "show", "full", "--base", stranger)
    assert shown["relation"] == "recorded" and shown["architecture"] == "BertForSequenceClassification"
    assert shown["labels"] == ["LABEL_0", "LABEL_1", "LABEL_2"] and shown["loss"]["difference"] > 0.1
    size = sum(path.stat().st_size for path in Store().path("full").iterdir())
    of_tensors = sum(t.numel() * t.element_size() for t in tensors(world.root / "float32").values())
    assert shown["mb"] == size / 1e6 and shown["compression"] == of_tensors / size


def test_the_lineage_of_an_entry_s_base_is_kept_with_it(runs: Runs) -> None:
    world = runs.world
    runs.run("store", "add", "--tuned", world.root / "float32", "--base", world.upgraded, "--name", "n")
    wanted = [f"{base} ({fingerprint(Base(base)).weights[:12]})" for base in (world.upgraded, world.base)]
    assert runs.json("store", "show", "n")["lineage"] == wanted
    assert f"{'lineage':14}{wanted[0]} <- {wanted[1]}\n" in runs.run("store", "show", "n")
    assert runs.json("store", "ls")["entries"][0]["base"] == wanted[0]


def test_weights_by_name_wherever_weights_are_taken(runs: Runs) -> None:
    world = runs.world
    runs.run("store", "add", "--tuned", world.run, "--name", "n", "--store", runs.tmp / "other")
    shared = ("--weights", "n", "--base", world.base, "--store", runs.tmp / "other")
    named = runs.json("evaluate", *shared, "--task", world.task)["runs"][0]
    by_path = runs.json("evaluate", "--weights", world.run, "--base", world.base, "--task", world.task)["runs"][0]
    assert {**named, "weights": None} == {**by_path, "weights": None}
    runs.run("apply", *shared, "--out", runs.tmp / "out")
    assert (runs.tmp / "out" / MODEL).is_file()
    assert "n: is no directory of adapted weights, nor a name in" in runs.refused(
        "apply", "--weights", "n", "--base", world.base, "--out", runs.tmp / "x"
    )


def test_verify_names_what_is_damaged(runs: Runs) -> None:
    runs.add(runs.world.root / "lora", "good")
    runs.add(runs.world.root / "ia3", "bad")
    assert runs.json("store", "verify")["entries"] == {"bad": [], "good": []}
    file = Store().path("bad") / ADAPTER_CONFIG
    file.write_bytes(file.read_bytes().replace(b"IA3", b"IA2"))
    said = runs.refused("store", "verify")
    assert f"damaged: {file}: was changed after it was written" in said and "good" not in said
    assert runs.json("store", "verify", "good")["entries"] == {"good": []}
    assert "holds no 'ugly', only bad, good" in runs.refused("store", "verify", "ugly")


# ---- what is refused


def test_a_checkpoint_of_another_base_is_refused_with_every_tensor(runs: Runs) -> None:
    other = make_base(runs.tmp / "other", hidden=16, layers=1, mlm_head=False)
    said = runs.not_added(runs.world.root / "float32", base=other)
    assert "bert.embeddings.LayerNorm.bias is (32,), the base's (16,)" in said
    assert "the base lacks encoder.layer.1.output.dense.weight;" in said


def test_another_vocabulary_of_the_same_size_is_refused(runs: Runs) -> None:
    tuned = runs.copy(runs.world.root / "float32")
    make_tokenizer(["new", *[f"w{i}" for i in range(194)]]).save_pretrained(tuned)
    assert "has another vocabulary" in runs.not_added(tuned)


def test_an_architecture_that_is_no_model_of_this_kind_is_refused(runs: Runs) -> None:
    tuned = runs.copy(runs.world.root / "float32")
    for architecture in ("RobertaForSequenceClassification", "os.system", "BertTokenizer"):
        rewrite(tuned / "config.json", architectures=[architecture])
        assert f"architecture: found '{architecture}', no model of type 'bert'" in runs.not_added(tuned)


def test_labels_that_are_not_the_task_s_are_refused(runs: Runs) -> None:
    tuned = runs.copy(runs.world.root / "float32")
    rewrite(tuned / "config.json", id2label={"0": "a", "1": "b", "2": "c"}, label2id={"a": 0, "b": 1, "c": 2})
    said = runs.not_added(tuned, "--task", runs.world.task)
    assert "--task: task has labels ['left', 'middle', 'right'], the weights ['a', 'b', 'c']" in said


def test_an_adapter_that_is_not_all_there_is_refused(runs: Runs) -> None:
    world, tuned = runs.world, runs.copy(runs.world.root / "lora")
    whole = load_file(tuned / ADAPTER)

    def refused_with(changed: dict[str, torch.Tensor]) -> str:
        save_file(changed, tuned / ADAPTER)
        return runs.not_added(tuned)

    first = sorted(n for n in whole if "lora_A" in n)[0]
    assert "without effect" in refused_with({})
    assert f"{first} is (0,), the model's is (3, 32)" in refused_with({**whole, first: torch.empty(0)})
    assert f"{first} is missing" in refused_with({n: t for n, t in whole.items() if n != first})
    assert "x.lora_A.weight has no place" in refused_with({**whole, "base_model.model.x.lora_A.weight": torch.ones(1)})
    heads = {n for n in whole if "classifier" in n}
    silent = {n: t * 0 if "lora_B" in n else t for n, t in whole.items()}
    rewrite(tuned / ADAPTER_CONFIG, task_type=None, modules_to_save=None)
    assert "lora_B.weight and its like are as in a fresh adapter" in refused_with(
        {n: silent[n] for n in whole.keys() - heads}
    )
    assert "needs classifier.bias, classifier.weight" in refused_with({n: whole[n] for n in whole.keys() - heads})
    assert "needs pooler.dense.bias, pooler.dense.weight" in runs.not_added(world.root / "lora", base=world.headless)
    (tuned / ADAPTER).rename(tuned / "adapter_model.bin")
    assert "only found adapter_model.bin (pickle, never loaded)" in runs.not_added(tuned)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--codec", "zip"], "codec: found 'zip', expected one of exact, bf16, lowrank, 1bit"),
        (["--rank", "4"], "--rank: found 4 with codec None"),
        (["--codec", "lowrank", "--rank", "0"], "--rank: found 0"),
        (["--name", "../n"], "--name: found '../n', expected letters"),
        (["--tuned", "nowhere"], "--tuned: nowhere is no directory"),
        (["--base", "./nowhere"], "./nowhere: is missing, expected a model directory"),
        (["--task", "nowhere"], "nowhere: no such file or directory"),
    ],
)
def test_options_that_are_wrong_are_named(runs: Runs, options: list[str], said: str) -> None:
    assert said in runs.not_added(runs.world.root / "float32", *options)


def test_exports_that_make_no_sense_are_refused(runs: Runs) -> None:
    world = runs.world
    runs.add(world.root / "float32", "full")
    runs.add(world.root / "lora", "lora")
    stranger = make_base(runs.tmp / "stranger", mlm_head=False, seed=9)

    def refused(name: str, form: str, base: Path, out: Path) -> str:
        return runs.refused("store", "export", name, form, "--base", base, "--out", out)

    assert "full: is a delta of all weights" in refused("full", "--peft", world.base, runs.tmp / "out")
    for name, form in (("full", "--merged"), ("lora", "--merged"), ("lora", "--peft")):
        assert "belongs to base" in refused(name, form, stranger, runs.tmp / "out")
        assert "exists and is not empty" in refused(name, form, world.base, world.base)


# ---- everything at once


def test_the_benchmark_finds_every_flip_and_every_malformed_file_clear() -> None:
    assert flips(quick=True) == {"tried": 200, "found": 200}
    figures = fuzz(count=60, commands=1)
    assert figures["tried"] == figures["clear_errors"] == 60


def test_every_pickle_would_spring_the_trap(monkeypatch: pytest.MonkeyPatch) -> None:
    import os
    import pickle

    monkeypatch.delenv(malformed.MARK, raising=False)
    pickle.loads(pickle.dumps(malformed.Opened()))
    assert os.environ.pop(malformed.MARK) == "1"
