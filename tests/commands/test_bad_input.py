"""Bad input of every kind: one line that names what is wrong, exit status 2, nothing written, nothing unpickled."""

from __future__ import annotations

import errno
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import ROOT
from safetensors.torch import load_file, save_file
from transformers import RobertaConfig, RobertaModel
from worlds import (
    make_base,
    make_corpus,
    make_outdated,
    make_task,
    make_tokenizer,
    make_upgraded,
    rewrite_rows,
    write_config,
)

from recyclable import distributed
from recyclable.cli import main
from recyclable.commands.parts.status import guarded
from recyclable.weights.manifest import read_manifest

TRAINING = {"max_steps": 2, "learning_rate": 1e-3, "train_batch_size": 4, "max_length": 24, "save_every": 0}


@dataclass(frozen=True)
class World:
    """Directories that are all in order; tests copy what they break."""

    base: Path
    headless: Path
    upgraded: Path
    stranger: Path
    task: Path
    corpus: Path
    outdated: Path


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("world")
    base, task = make_base(root / "base"), make_task(root / "task", train=30, dev=12, test=12)
    outdated = make_outdated(base, task, root / "outdated")
    rewrite_json(outdated / "manifest.json", lambda m: m["metrics"].update(dev={"accuracy": 0.5}))
    return World(
        base=base,
        headless=make_base(root / "headless", mlm_head=False),
        upgraded=make_upgraded(base, root / "upgraded"),
        stranger=make_base(root / "stranger", seed=9),
        task=task,
        corpus=make_corpus(root / "corpus", documents=20),
        outdated=outdated,
    )


class Runs:
    """Writes run configs and runs the command in this process."""

    def __init__(self, world: World, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
        self.world, self.tmp, self._capsys = world, tmp_path, capsys
        self.out = tmp_path / "result" / "run"

    def config(self, verb: str, **changed: Any) -> Path:
        """A run.yaml that works, with these settings changed; None leaves a setting out."""
        world = self.world
        own = {
            "pretrain": {"base": world.base, "corpus": {"train": str(world.corpus)}},
            "tune": {"base": world.base, "task": world.task},
            "recycle": {
                "base": world.upgraded,
                "old_base": world.base,
                "weights": world.outdated,
                "task": world.task,
                "method": "init",
            },
        }[verb]
        content = {"out": self.out, **TRAINING, **own, **changed}
        return write_config(self.tmp / "run.yaml", content)

    def run(self, *argv: object) -> tuple[int, str, str]:
        """Exit status, standard output and standard error of `recyclable argv`."""
        self._capsys.readouterr()
        try:
            status = main([str(argument) for argument in argv])
        except SystemExit as ended:
            status = ended.code
        captured = self._capsys.readouterr()
        return status, captured.out, captured.err

    def refused(self, *argv: object) -> str:
        """The one line that `recyclable argv` says when it refuses; the result's directory stays as it was."""
        before = sorted(self.tmp.rglob("*"))
        status, _, err = self.run(*argv)
        lines = err.strip().splitlines()
        assert (status, len(lines)) == (2, 1), err
        assert lines[0].startswith("recyclable: error: ")
        assert sorted(self.tmp.rglob("*")) == before and not self.out.exists()
        return lines[0]

    def refused_run(self, verb: str, *options: object, **changed: Any) -> str:
        """Like `refused`, for a training verb with these settings changed."""
        return self.refused(verb, self.config(verb, **changed), *options)

    def ds_config(self, content: dict[str, Any] | str) -> Path:
        path = self.tmp / "ds.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    def copy(self, folder: Path, name: str = "copy") -> Path:
        return Path(shutil.copytree(folder, self.tmp / name))


@pytest.fixture
def runs(world: World, tmp_path: Path, capsys: pytest.CaptureFixture) -> Runs:
    return Runs(world, tmp_path, capsys)


def rewrite_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


# ---- the run config


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"learning_rat": 1}, "run.yaml: unknown key 'learning_rat', did you mean 'learning_rate'?"),
        ({"max_steps": "many"}, "max_steps: found 'many', expected: a valid integer"),
        ({"max_steps": 0}, "max_steps: found 0, expected: greater than 0"),
        ({"max_steps": None}, "run.yaml: key 'max_steps' is missing"),
        ({"task": None}, "key 'task' is missing"),
        ({"base": 7}, "base: found 7, expected: a valid string"),
        ({"tuning": "ladder"}, "run.yaml: tuning is 'ladder', expected one of bias, bottleneck, full, ia3, lora"),
        ({"base": "$NO_SUCH_VARIABLE/b"}, "uses the environment variable NO_SUCH_VARIABLE, which is not set"),
        ({"metric": "acuracy"}, "metric: is 'acuracy', expected accuracy or f1_macro"),
        ({"metric": "pearson"}, "metric: is 'pearson', expected accuracy or f1_macro"),
    ],
)
def test_a_setting_that_is_wrong_is_named(runs: Runs, changed: dict[str, Any], said: str) -> None:
    assert said in runs.refused_run("tune", **changed)


def test_the_mean_squared_error_does_not_select_since_less_of_it_is_better(runs: Runs) -> None:
    task = runs.copy(runs.world.task)
    rewrite_rows(task, lambda row: row.update(label=len(row["text"]) + 0.5))
    said = runs.refused_run("tune", task=task, metric="mse")
    assert "metric: is 'mse', expected pearson or spearman for regression" in said


def test_broken_yaml_is_told_by_line(runs: Runs) -> None:
    path = runs.tmp / "run.yaml"
    path.write_text("base: b\nout: o\ntask: [t\nseed: 1\n")
    assert re.search(r"run\.yaml: broken YAML: line 4, column 5: ", runs.refused("tune", path))


def test_a_config_that_is_no_mapping(runs: Runs) -> None:
    path = runs.tmp / "run.yaml"
    path.write_text("- base\n")
    assert "run.yaml: holds list, expected a mapping of settings" in runs.refused("tune", path)


def test_what_one_has_no_permission_for_is_told_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> int:
        raise PermissionError(errno.EACCES, "Permission denied", "/data/corpus.jsonl")

    assert guarded(work) == 2  # root may read everything, so that no file would do
    said = capsys.readouterr().err
    assert (
        said
        == "recyclable: error: /data/corpus.jsonl: cannot be used (Permission denied), expected permission for it\n"
    )


def test_a_missing_run_config(runs: Runs) -> None:
    said = runs.refused("tune", runs.tmp / "nowhere.yaml")
    assert "nowhere.yaml: cannot be read (No such file or directory); expected a YAML run config" in said


def test_an_override_without_a_value(runs: Runs) -> None:
    assert "seed: not understood, expected key=value" in runs.refused_run("tune", "seed")


def test_an_override_that_is_wrong(runs: Runs) -> None:
    assert "unknown key 'sed', did you mean 'seed'?" in runs.refused_run("tune", "sed=3")


@pytest.mark.parametrize("nproc", [0, -2])
def test_no_ranks(runs: Runs, nproc: int) -> None:
    assert f"--nproc: found {nproc}, expected at least 1" in runs.refused_run("tune", "--nproc", nproc)


def test_a_launcher_without_hosts_or_of_no_known_kind(runs: Runs) -> None:
    assert "--launcher: says what reaches other hosts" in runs.refused_run("tune", "--launcher", "openmpi")
    status, _, err = runs.run("tune", runs.config("tune"), "--launcher", "banana")
    assert status == 2 and "invalid choice: 'banana'" in err


@pytest.mark.parametrize("argv", [[], ["tun", "run.yaml"], ["tune"], ["tune", "run.yaml", "--resumes"]])
def test_an_unknown_verb_or_flag_ends_with_status_2_too(runs: Runs, argv: list[str]) -> None:
    status, _, err = runs.run(*argv)
    assert status == 2 and "usage: recyclable" in err and "error: " in err


# ---- out


def test_an_out_that_holds_something_else_is_left_alone(runs: Runs) -> None:
    runs.out.mkdir(parents=True)
    (runs.out / "thesis.txt").write_text("mine")
    status, _, err = runs.run("tune", runs.config("tune"))
    assert (status, len(err.splitlines())) == (2, 1)
    assert f"out: {runs.out} is not empty and holds no run of recyclable" in err
    assert [path.name for path in runs.out.iterdir()] == ["thesis.txt"]


def test_an_out_that_is_a_file(runs: Runs) -> None:
    file = runs.tmp / "file"
    file.write_text("")
    assert f"out: {file} is a file, expected a directory" in runs.refused_run("tune", out=file)


# ---- bases


def test_a_missing_base(runs: Runs) -> None:
    said = runs.refused_run("tune", base=runs.tmp / "nowhere")
    assert f"{runs.tmp / 'nowhere'}: is missing, expected a model directory or a hub name" in said


@pytest.mark.parametrize("verb", ["tune", "pretrain"])
def test_a_base_without_weights(runs: Runs, verb: str) -> None:
    base = runs.copy(runs.world.base)
    (base / "model.safetensors").unlink()
    assert f"{base}: no weights found; expected model.safetensors" in runs.refused_run(verb, base=base)


def test_a_base_without_a_config(runs: Runs) -> None:
    base = runs.copy(runs.world.base)
    (base / "config.json").unlink()
    assert f"{base}: has no config.json" in runs.refused_run("tune", base=base)


class Trap:
    """Unpickling this creates a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple:
        return open, (str(self.file), "w")


@pytest.mark.parametrize("verb", ["tune", "pretrain"])
def test_a_base_that_is_a_pickle_is_never_opened(runs: Runs, verb: str, tmp_path_factory) -> None:
    sprung = tmp_path_factory.mktemp("trap") / "sprung"
    base = runs.copy(runs.world.base)
    weights = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    torch.save({**weights, "trap": Trap(sprung)}, base / "pytorch_model.bin")
    said = runs.refused_run(verb, base=base)
    assert f"{base}: only found pytorch_model.bin (pickle, never loaded); expected model.safetensors" in said
    assert not sprung.exists()
    torch.load(base / "pytorch_model.bin", weights_only=False)
    assert sprung.exists(), "the trap works"


def test_a_pickle_that_calls_itself_safetensors_is_never_opened(runs: Runs, tmp_path_factory) -> None:
    sprung = tmp_path_factory.mktemp("trap") / "sprung"
    base = runs.copy(runs.world.base)
    (base / "model.safetensors").write_bytes(pickle.dumps(Trap(sprung)))
    said = runs.refused_run("tune", base=base)
    assert f"{base / 'model.safetensors'}: is not a valid safetensors file" in said
    assert not sprung.exists()


@pytest.mark.parametrize("damage", ["header", "short", "empty"])
def test_a_safetensors_file_that_does_not_hold_together(runs: Runs, damage: str) -> None:
    base = runs.copy(runs.world.base)
    file = base / "model.safetensors"
    content = file.read_bytes()
    broken = {"header": content[:8] + b"#" + content[9:], "short": content[:-100], "empty": b""}
    file.write_bytes(broken[damage])
    assert f"{file}: is not a valid safetensors file" in runs.refused_run("tune", base=base)


def test_a_base_that_lacks_a_backbone_tensor(runs: Runs) -> None:
    base = runs.copy(runs.world.base)
    tensors = load_file(base / "model.safetensors")
    del tensors["bert.encoder.layer.1.output.dense.weight"]
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    said = runs.refused_run("tune", base=base)
    assert f"{base}: lacks 1 backbone tensors: bert.encoder.layer.1.output.dense.weight" in said


def test_a_base_without_a_tokenizer(runs: Runs) -> None:
    base = runs.copy(runs.world.base)
    for file in base.glob("tokenizer*"):
        file.unlink()
    assert f"{base}: holds no usable tokenizer" in runs.refused_run("tune", base=base)
    (base / "tokenizer.json").write_text("{")
    assert f"{base}: holds no usable tokenizer" in runs.refused_run("tune", base=base)


def test_a_tokenizer_with_more_pieces_than_the_embedding_has_rows(runs: Runs) -> None:
    base = runs.copy(runs.world.base)
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["one", "more"])
    tokenizer.save_pretrained(base)
    for verb in ("tune", "pretrain"):
        said = runs.refused_run(verb, base=base)
        assert f"{base}: its tokenizer has 202 pieces, but its embedding only 200 rows" in said


def test_pretraining_needs_a_mask_token(runs: Runs) -> None:
    base = runs.copy(runs.world.base)
    tokenizer = make_tokenizer()
    tokenizer.mask_token = None
    tokenizer.save_pretrained(base)
    assert f"{base}: its tokenizer has no mask token" in runs.refused_run("pretrain", base=base)


def test_a_head_to_keep_must_be_there(runs: Runs) -> None:
    said = runs.refused_run("pretrain", base=runs.world.headless, mlm_head="keep")
    assert f"mlm_head: is 'keep', but {runs.world.headless} has no trained head (lacks cls.predictions" in said


@pytest.mark.parametrize("verb", ["tune", "pretrain", "recycle"])
def test_texts_longer_than_the_base_has_positions(runs: Runs, verb: str) -> None:
    said = runs.refused_run(verb, max_length=65)
    assert "max_length: is 65, but " in said and "has positions for 64 tokens at most" in said


def test_robertas_first_positions_are_never_used(runs: Runs) -> None:
    base = runs.tmp / "roberta"
    size = {"vocab_size": 200, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = RobertaConfig(**size, intermediate_size=32, max_position_embeddings=34, pad_token_id=1)
    RobertaModel(config).save_pretrained(base)
    make_tokenizer().save_pretrained(base)
    said = runs.refused_run("tune", base=base, max_length=33)
    assert f"max_length: is 33, but {base} has positions for 32 tokens at most" in said


# ---- corpora and tasks


def test_a_missing_corpus(runs: Runs) -> None:
    said = runs.refused_run("pretrain", corpus=str(runs.tmp / "nowhere.txt"))
    assert f"{runs.tmp / 'nowhere.txt'}: no such file or directory" in said


@pytest.mark.parametrize("text", ["", "\n  \n\n"])
def test_an_empty_corpus(runs: Runs, text: str) -> None:
    file = runs.tmp / "empty.txt"
    file.write_text(text)
    assert f"{file}: no text found" in runs.refused_run("pretrain", corpus=str(file))


def test_a_corpus_shorter_than_a_sequence_or_without_one_to_hold_out(runs: Runs) -> None:
    file = runs.tmp / "short.txt"
    file.write_text("w1 w2 w3\n")
    assert "corpus: it has 3 tokens, fewer than one sequence of 24" in runs.refused_run("pretrain", corpus=str(file))
    file.write_text("w1 w2 w3 " * 10)
    assert "corpus: only one sequence" in runs.refused_run("pretrain", corpus=str(file))


def test_a_missing_task(runs: Runs) -> None:
    said = runs.refused_run("tune", task=runs.tmp / "nowhere")
    assert f"{runs.tmp / 'nowhere'}: no such file or directory, expected a directory with train.*" in said


def test_a_task_without_labels(runs: Runs) -> None:
    task = runs.copy(runs.world.task)
    rewrite_rows(task / "train.jsonl", lambda row: row.pop("label"))
    said = runs.refused_run("tune", task=task)
    assert f"{task / 'train.jsonl'}, row 1: no column 'label', found ['text']" in said


def test_a_label_that_train_lacks(runs: Runs) -> None:
    task = runs.copy(runs.world.task)
    rewrite_rows(task / "dev.jsonl", lambda row: row.update(label="up"))
    said = runs.refused_run("tune", task=task)
    assert f"{task / 'dev.jsonl'}, row 1: label 'up' is not in train, which has left, middle, right" in said


def test_an_empty_dev_split(runs: Runs) -> None:
    task = runs.copy(runs.world.task)
    (task / "dev.jsonl").write_text("")
    assert f"{task / 'dev.jsonl'}: this split is empty" in runs.refused_run("tune", task=task)


def test_no_dev_split(runs: Runs) -> None:
    task = runs.copy(runs.world.task)
    (task / "dev.jsonl").unlink()
    assert f"{task}: has no dev split, which selects the best step" in runs.refused_run("tune", task=task)


def test_more_shots_than_a_class_has_takes_all_and_says_so(runs: Runs) -> None:
    status, out, err = runs.run("tune", runs.config("tune", shots=6))
    assert status == 0, err
    notices = [line for line in out.splitlines() if line.startswith("notice: ")]
    expected = "notice: fewer than 6 dev examples, all are taken: left (4), middle (4), right (4)"
    assert notices == [expected]
    assert read_manifest(runs.out).settings["shots"] == 6


def test_more_shots_than_a_regression_has_takes_all_and_says_so(runs: Runs) -> None:
    task = runs.copy(runs.world.task, "lengths")
    rewrite_rows(task, lambda row: row.update(label=len(row["text"]) / 10 + 0.05))
    status, out, err = runs.run("tune", runs.config("tune", task=task, shots=20))
    assert status == 0, err
    assert "notice: fewer than 20 dev examples, all are taken: lengths (12)" in out


# ---- adapted weights and the bases they belong to


def test_weights_of_another_base(runs: Runs) -> None:
    said = runs.refused_run("recycle", old_base=runs.world.stranger)
    assert re.search(
        rf"{runs.world.outdated}: belongs to base '{runs.world.base}' \(weights [0-9a-f]{{12}}\), "
        rf"but {runs.world.stranger} has weights [0-9a-f]{{12}}$",
        said,
    )


def test_a_new_base_that_does_not_descend_from_the_old_one(runs: Runs) -> None:
    said = runs.refused_run("recycle", base=runs.world.stranger)
    assert f"{runs.world.outdated}: belongs to base '{runs.world.base}'" in said
    assert "does not descend from it by its lineage.json; `recyclable lineage declare` records" in said


def test_an_unrelated_base_may_be_allowed_and_the_manifest_says_so(runs: Runs) -> None:
    untrained = {name: None for name in TRAINING if name != "max_length"}
    config = runs.config("recycle", base=runs.world.stranger, method="apply", **untrained)
    status, _, err = runs.run("recycle", config, "allow_unrelated=true")
    assert status == 0, err
    manifest = read_manifest(runs.out)
    assert manifest.recycled_from["relation"] == "unrelated"
    assert manifest.base["name"] == str(runs.world.stranger)
    assert manifest.recycled_from["base"]["name"] == str(runs.world.base)


def test_a_lineage_that_is_broken(runs: Runs) -> None:
    base = runs.copy(runs.world.upgraded)
    (base / "lineage.json").write_text("{}")
    assert f"{base / 'lineage.json'}: broken, expected JSON with" in runs.refused_run("recycle", base=base)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"method": "apply", "scale": True}, "scale: found True, expected"),
        ({"max_steps": True}, "max_steps: found True, expected a number"),
    ],
)
def test_a_boolean_where_a_number_belongs(runs: Runs, settings: dict[str, Any], said: str) -> None:
    assert said in runs.refused_run("recycle", **settings)


def test_weights_for_other_labels(runs: Runs) -> None:
    task = runs.copy(runs.world.task)
    rewrite_rows(task, lambda row: row.update(label=row["label"].upper()))
    said = runs.refused_run("recycle", task=task)
    assert f"{runs.world.outdated}: was tuned for labels ['left', 'middle', 'right'], the task " in said
    assert "['LEFT', 'MIDDLE', 'RIGHT']" in said


def test_missing_weights(runs: Runs) -> None:
    said = runs.refused_run("recycle", weights=runs.tmp / "nowhere")
    assert f"{runs.tmp / 'nowhere'}: is no directory of adapted weights, nor a name in store, which has nothing" in said


def test_weights_without_a_manifest(runs: Runs) -> None:
    weights = runs.copy(runs.world.outdated)
    (weights / "manifest.json").unlink()
    said = runs.refused_run("recycle", weights=weights)
    assert f"{weights}: holds no manifest.json, expected adapted weights that recyclable wrote" in said


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: m.update(kind="pruned"), "kind 'pruned' with files"),
        (lambda m: m.update(format=99), "format 99, this version reads 1"),
        (lambda m: m.update(colour="red"), "broken manifest: "),
        (lambda m: m.pop("base"), "broken manifest: "),
        (lambda m: m["base"].pop("fingerprint"), "broken manifest: base.fingerprint: Field required"),
        (lambda m: m["tuning"].update(tuning="prefix"), "kind 'delta' with tuning 'prefix' is not understood"),
    ],
)
def test_a_manifest_that_is_not_understood(runs: Runs, change: Callable, said: str) -> None:
    weights = runs.copy(runs.world.outdated)
    rewrite_json(weights / "manifest.json", change)
    line = runs.refused_run("recycle", weights=weights)
    assert said in line and str(weights) in line


def test_a_manifest_that_is_no_json(runs: Runs) -> None:
    weights = runs.copy(runs.world.outdated)
    (weights / "manifest.json").write_text('{"kind": ')
    assert f"{weights / 'manifest.json'}: broken JSON: " in runs.refused_run("recycle", weights=weights)


def test_a_delta_changed_after_it_was_written(runs: Runs) -> None:
    weights = runs.copy(runs.world.outdated)
    content = bytearray((weights / "delta.safetensors").read_bytes())
    content[-1] ^= 1
    (weights / "delta.safetensors").write_bytes(content)
    said = runs.refused_run("recycle", weights=weights)
    assert f"{weights / 'delta.safetensors'}: was changed after it was written" in said


def test_a_head_that_is_gone(runs: Runs) -> None:
    weights = runs.copy(runs.world.outdated)
    (weights / "head.safetensors").unlink()
    said = runs.refused_run("recycle", weights=weights)
    assert f"{weights / 'head.safetensors'}: is missing, but the manifest lists it" in said


def test_a_teacher_cache_that_is_a_file(runs: Runs) -> None:
    file = runs.tmp / "answers"
    file.write_text("")
    said = runs.refused_run("recycle", method="distill", teacher_cache=file)
    assert f"teacher_cache: {file} is a file, expected a directory" in said


def test_a_teacher_with_another_tokenizer(runs: Runs) -> None:
    teacher = runs.copy(runs.world.base)
    make_tokenizer([f"v{i}" for i in range(195)]).save_pretrained(teacher)
    said = runs.refused_run("pretrain", teacher=teacher)
    assert f"teacher: {teacher} has another tokenizer" in said and f"than {runs.world.base}" in said


def test_scoring_weights_on_an_unrelated_base(runs: Runs) -> None:
    world = runs.world
    argv = ["evaluate", "--weights", world.outdated, "--base", world.stranger, "--task", world.task]
    assert "does not descend from it" in runs.refused(*argv)


def test_scoring_a_split_that_is_not_there(runs: Runs) -> None:
    world = runs.world
    argv = ["evaluate", "--weights", world.outdated, "--base", world.base, "--task", world.task, "--split", "final"]
    assert f"{world.task}: has no final split, found ['dev', 'test', 'train']" in runs.refused(*argv)


# ---- ds_config and ranks


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"train_batch_size": 8}, "ds.json: train_batch_size is 8, but train_batch_size in {run} is 4"),
        ({"gradient_clipping": 0.5}, "ds.json: gradient_clipping is 0.5, but max_grad_norm in {run} is 1.0"),
        (
            {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 4},
            "ds.json: train_micro_batch_size_per_gpu 2 x gradient_accumulation_steps 4 x 1 ranks = 8, "
            "but train_batch_size 4 in {run}",
        ),
        ({"train_micro_batch_size_per_gpu": 3}, "ds.json: train_micro_batch_size_per_gpu 3 x 1 ranks does not divide"),
        ({"train_batch_size": "auto"}, 'ds.json: train_batch_size is "auto", expected a value'),
        ({"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}}, 'reduce_bucket_size is "auto"'),
        ({"optimizer": {"type": "AdamW"}}, "ds.json: section 'optimizer' belongs to the run config"),
        ({"zero_optimisation": {"stage": 2}}, "unknown key 'zero_optimisation', did you mean 'zero_optimization'?"),
        ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage is 4, expected 0, 1, 2 or 3"),
        ({"fp16": {"enabled": True}}, "fp16 is enabled, but training runs on the CPU"),
        ('{"bf16": ', "ds.json: broken JSON: line 1, column 10"),
    ],
)
@pytest.mark.parametrize("verb", ["tune"])
def test_a_ds_config_that_cannot_be_meant(
    runs: Runs, monkeypatch: pytest.MonkeyPatch, verb: str, content: Any, said: str
) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    run = runs.config(verb)
    assert said.format(run=run) in runs.refused(verb, run, "--deepspeed_config", runs.ds_config(content))


@pytest.mark.parametrize("verb", ["pretrain", "recycle"])
def test_every_training_verb_checks_its_ds_config_first(runs: Runs, verb: str) -> None:
    said = runs.refused_run(verb, "--deepspeed_config", runs.ds_config({"train_batch_size": 8}))
    assert "ds.json: train_batch_size is 8" in said


def test_a_ds_config_that_is_not_there(runs: Runs) -> None:
    said = runs.refused_run("tune", "--deepspeed_config", runs.tmp / "nowhere.json")
    assert "nowhere.json: is no DeepSpeed config: expected a JSON file or one of the shipped " in said


@pytest.mark.parametrize(
    ("verb", "said"), [("tune", "30 training examples for 1000 ranks"), ("pretrain", "sequences for 1000 ranks")]
)
def test_more_ranks_than_examples(runs: Runs, monkeypatch: pytest.MonkeyPatch, verb: str, said: str) -> None:
    monkeypatch.setattr(distributed, "world_size", lambda: 1000)
    assert said in runs.refused_run(verb, train_batch_size=1000)


def test_a_batch_that_the_ranks_cannot_share(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    assert "run.yaml: train_batch_size 4 is not divisible by the 3 ranks" in runs.refused_run("tune")


# ---- as processes


def command(*argv: object) -> subprocess.CompletedProcess:
    env = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-m", "recyclable.cli", *map(str, argv)]
    return subprocess.run(words, env=env, capture_output=True, text=True, timeout=400)


def test_the_command_itself_ends_with_status_2(runs: Runs) -> None:
    ended = command("tune", runs.config("tune", max_steps="many"))
    assert ended.returncode == 2 and ended.stdout == ""
    assert ended.stderr.startswith("recyclable: error: ") and ended.stderr.count("\n") == 1
    assert not runs.out.exists()


def test_status_2_passes_through_the_launcher_and_one_rank_speaks(runs: Runs) -> None:
    config = runs.config("recycle", old_base=runs.world.stranger)
    ended = command("recycle", config, "--nproc", 2)
    assert ended.returncode == 2, ended.stderr
    assert ended.stderr.count("recyclable: error: ") == 1 and "belongs to base" in ended.stderr
    assert ended.stderr.strip().count("\n") == 0, ended.stderr
    assert not runs.out.exists()
