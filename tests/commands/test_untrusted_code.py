"""Python in directories of others never runs and nobody is asked to let it, whatever waits on standard input."""

from __future__ import annotations

import ast
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import transformers
import yaml
from processes import ROOT
from transformers import LlamaConfig, LlamaForCausalLM, MambaConfig, MambaForCausalLM
from verbs import Verbs
from worlds import LABELS, make_adapter, make_base, make_corpus, make_model, make_outdated, make_task, make_upgraded

SMALL = {"vocab_size": 200, "hidden_size": 16, "num_hidden_layers": 1, "pad_token_id": 0}


class World:
    """Directories that are all in order; tests copy what they spoil."""

    def __init__(self, root: Path) -> None:
        self.base, self.task = make_base(root / "base"), make_task(root / "task", train=30, dev=12, test=12)
        self.corpus, self.upgraded = make_corpus(root / "corpus", documents=20), make_upgraded(self.base, root / "up")
        self.outdated = make_outdated(self.base, self.task, root / "outdated")
        self.adapter = make_adapter(self.base, self.task, root / "adapter", "lora")
        heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 32}
        self.llama = make_model(root / "llama", LlamaForCausalLM(LlamaConfig(**SMALL, **heads)))
        self.mamba = make_model(root / "mamba", MambaForCausalLM(MambaConfig(**SMALL)))


class Runs(Verbs):
    """Runs the command while a thousand times "y" waits on standard input."""

    def __init__(self, world: World, tmp: Path, capsys: pytest.CaptureFixture, patch: pytest.MonkeyPatch) -> None:
        super().__init__(tmp, capsys)
        self.world, self.mark, self.stdin = world, tmp / "it-ran", io.StringIO("y\n" * 1000)
        patch.setattr(sys, "stdin", self.stdin)

    def spoiled(self, folder: Path, file: str = "config.json", **content: object) -> Path:
        """A copy of a directory with this in one of its files, and beside it Python that leaves a mark when it runs."""
        copy = Path(shutil.copytree(folder, self.tmp / "spoiled"))
        for name in ("configuration_x", "tokenization_x", "modeling_x", copy.name):
            lines = f"from pathlib import Path\nPath({str(self.mark)!r}).touch()\nclass Mine:\n    pass\n"
            (copy / f"{name}.py").write_text(lines)
        known = json.loads((copy / file).read_text()) if (copy / file).is_file() else {}
        (copy / file).write_text(json.dumps({**known, **content}))
        return copy

    def run(self, *argv: object) -> tuple[int, list[str]]:
        told = super().run(*argv)
        assert not self.mark.exists(), "the directory's Python ran"
        assert self.stdin.tell() == 0, "a question was asked"
        return told


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture
def runs(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Runs]:
    before = dict(os.environ)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RECYCLABLE_STORE", str(tmp_path / "store"))
    yield Runs(world, tmp_path, capsys, monkeypatch)
    os.environ.clear()
    os.environ.update(before)


OWN_KIND = {
    "model_type": "mine",
    "auto_map": {
        "AutoConfig": "configuration_x.Mine",
        "AutoModel": "modeling_x.Mine",
        "AutoModelForMaskedLM": "modeling_x.Mine",
        "AutoModelForSequenceClassification": "modeling_x.Mine",
    },
}


def argv_of(verb: str, runs: Runs, base: Path) -> list[object]:
    """How a verb is called on this base."""
    world, out = runs.world, runs.out
    weights = ["--weights", world.outdated, "--base", base]
    return {
        "tune": lambda: runs.training("tune", base=base, task=world.task),
        "pretrain": lambda: runs.training("pretrain", base=base, corpus={"train": str(world.corpus)}),
        "teacher": lambda: runs.training(
            "pretrain", base=world.base, teacher=base, corpus={"train": str(world.corpus)}
        ),
        "recycle": lambda: runs.training(
            "recycle", base=base, old_base=world.base, weights=world.outdated, task=world.task, method="init"
        ),
        "old base": lambda: runs.training(
            "recycle", base=world.upgraded, old_base=base, weights=world.outdated, task=world.task, method="init"
        ),
        "evaluate": lambda: ["evaluate", *weights, "--task", world.task],
        "apply": lambda: ["apply", *weights, "--out", out],
        "probe": lambda: ["probe", *weights, "--out", out],
        "lineage show": lambda: ["lineage", "show", base],
        "lineage declare": lambda: ["lineage", "declare", world.upgraded, "--parent", base],
        "store add": lambda: ["store", "add", "--tuned", world.base, "--base", base, "--name", "n"],
        "store add, tuned": lambda: ["store", "add", "--tuned", base, "--base", world.base, "--name", "n"],
        "store similar": lambda: ["store", "similar", "--task", world.task, "--base", base],
    }[verb]()


@pytest.mark.parametrize(
    "verb",
    [
        *("tune", "pretrain", "teacher", "recycle", "old base", "evaluate", "apply", "probe"),
        *("lineage show", "lineage declare", "store add", "store add, tuned", "store similar"),
    ],
)
def test_a_model_type_of_its_own(runs: Runs, verb: str) -> None:
    base = runs.spoiled(runs.world.base, **OWN_KIND)
    said = runs.refused(*argv_of(verb, runs, base))
    assert f"{base / 'config.json'}: cannot be used: it needs Python code of its own (auto_map), which is never" in said
    assert "trust_remote_code" not in said


def test_a_type_that_transformers_has_is_taken_from_there(runs: Runs) -> None:
    base = runs.spoiled(runs.world.base, auto_map=OWN_KIND["auto_map"])
    status, said = runs.run(*argv_of("tune", runs, base))
    assert (status, said) == (0, [])


def test_a_classifier_of_its_own_for_a_type_that_has_none(runs: Runs) -> None:
    base = runs.spoiled(runs.world.mamba, auto_map=OWN_KIND["auto_map"])
    said = runs.refused(*argv_of("tune", runs, base))
    assert "config.json: makes no model: it needs Python code of its own (auto_map), which is never run" in said


@pytest.mark.parametrize("auto_map", [["tokenization_x.Mine", None], {"AutoTokenizer": [None, "tokenization_x.Mine"]}])
def test_a_tokenizer_of_its_own(runs: Runs, auto_map: object) -> None:
    base = runs.spoiled(runs.world.llama, "tokenizer_config.json", auto_map=auto_map, tokenizer_class="Mine")
    said = runs.refused(*argv_of("tune", runs, base))
    assert f"{base}: holds no usable tokenizer: it needs Python code of its own (auto_map), which is never run" in said


@pytest.mark.parametrize("name", ["Mine", "tokenization_x.Mine", "os.system"])
def test_a_tokenizer_class_that_transformers_lacks(runs: Runs, name: str) -> None:
    base = runs.spoiled(runs.world.base, "tokenizer_config.json", tokenizer_class=name)
    status, said = runs.run(*argv_of("tune", runs, base))
    assert status in (0, 2) and len(said) == status // 2


@pytest.mark.parametrize("auto_map", [[], "x", 7, ["tokenization_x.Mine"]])
def test_a_map_that_is_none(runs: Runs, auto_map: object) -> None:
    base = runs.spoiled(runs.world.llama, "tokenizer_config.json", auto_map=auto_map, tokenizer_class="Mine")
    assert f"{base}: holds no usable tokenizer: " in runs.refused(*argv_of("tune", runs, base))


@pytest.mark.parametrize("at", ["attn_implementation", "_attn_implementation"])
def test_attention_from_a_package_of_the_hub(runs: Runs, at: str) -> None:
    base = runs.spoiled(runs.world.base, **{"inner": {at: "somebody/kernels@main"}})
    said = runs.refused(*argv_of("tune", runs, base))
    assert f"names code from elsewhere, which is never run: {at} 'somebody/kernels@main'" in said


# ---- adapters


@pytest.mark.parametrize("named", ["a directory", "the hub"])
def test_an_adapter_that_brings_another_model(runs: Runs, named: str) -> None:
    other = str(runs.spoiled(runs.world.base, **OWN_KIND)) if named == "a directory" else "somebody/model"
    adapter = Path(shutil.copytree(runs.world.adapter, runs.tmp / "adapter"))
    (adapter / "manifest.json").unlink()
    config = {"peft_type": "SHADOW", "task_type": "SEQ_CLS", "shadow_model": other}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    said = runs.refused("store", "add", "--tuned", adapter, "--base", runs.world.llama, "--name", "n")
    assert f"shadow_model is {other!r}, expected an adapter that needs its own tensors only" in said


def test_an_adapter_whose_config_names_classes_and_a_base_with_code(runs: Runs) -> None:
    other = runs.spoiled(runs.world.base, **OWN_KIND)
    adapter = Path(shutil.copytree(runs.world.adapter, runs.tmp / "adapter"))
    content = json.loads((adapter / "adapter_config.json").read_text())
    content.update(
        base_model_name_or_path=str(other),
        auto_mapping={"base_model_class": "Mine", "parent_library": f"{other.name}.modeling_x"},
    )
    (adapter / "adapter_config.json").write_text(json.dumps(content))
    (adapter / "manifest.json").unlink()
    status, said = runs.run("store", "add", "--tuned", adapter, "--base", runs.world.base, "--name", "n")
    assert (status, said) == (0, [])  # neither is looked at


# ---- data


def test_a_task_that_is_a_loading_script(runs: Runs) -> None:
    folder = runs.spoiled(runs.world.task, "rows.json")
    for file in folder.glob("*.jsonl"):
        file.rename(folder / f"hidden-{file.name}")
    for name in (str(folder), f"{folder}/{folder.name}.py", folder.name):
        (runs.tmp / "task.yaml").write_text(yaml.safe_dump({"dataset": name, "labels": list(LABELS)}))
        said = runs.refused(*runs.training("tune", base=runs.world.base, task=runs.tmp / "task.yaml"))
        assert f"{name}: no such path here, and the hub data set {name!r} could not be loaded" in said


def test_a_corpus_that_is_a_loading_script(runs: Runs) -> None:
    folder = runs.spoiled(runs.world.corpus, "rows.json")
    (folder / "train.txt").unlink()
    for name in (str(folder), f"{folder}/{folder.name}.py", folder.name):
        said = runs.refused(*runs.training("pretrain", base=runs.world.base, corpus={"train": name}))
        assert "no file named train.*" in said or "unsupported extension" in said


# ---- as a process


@pytest.mark.parametrize("ranks", [1, 2])
def test_yes_to_everything_starts_nothing(runs: Runs, ranks: int) -> None:
    base = runs.spoiled(runs.world.base, **OWN_KIND)
    command = [sys.executable, "-m", "recyclable.cli", *argv_of("tune", runs, base), "--nproc", ranks]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        [*map(str, command)], input="y\n" * 1000, env=environment, capture_output=True, text=True, timeout=400
    )
    assert (ended.returncode, ended.stdout) == (2, ""), ended.stderr
    assert not runs.mark.exists() and not runs.out.exists()
    assert ended.stderr.startswith("recyclable: error: ") and ended.stderr.count("\n") == 1


# ---- the source


def loading_calls() -> Iterator[tuple[str, ast.Call]]:
    """Every call that may load a class that a directory names: (where it stands, the call)."""
    for folder in ("recyclable", "benchmarks", "launch"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Call):
                    inside = node.args[0] if ast.unparse(node.func) == "partial" and node.args else node.func
                    owner = ast.unparse(inside.value) if isinstance(inside, ast.Attribute) else ""
                    fixed = isinstance(getattr(transformers, owner, None), type) and not owner.startswith("Auto")
                    if getattr(inside, "attr", "") in ("from_pretrained", "from_config", "load_dataset") and not fixed:
                        yield f"{file.relative_to(ROOT)}:{node.lineno}", node


def test_every_call_says_that_no_code_is_trusted() -> None:
    found = dict(loading_calls())
    assert len(found) > 5
    for where, call in found.items():
        said = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        assert said.get("trust_remote_code") == "False", where
