"""Every file that a run reads is known by the setting that names it, and hosts that have others are told apart."""

from __future__ import annotations

import errno
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier, local
from typing import Any, ClassVar

import pytest
from worlds import Chain, make_corpus, make_outdated

from recyclable import distributed
from recyclable.errors import InputError
from recyclable.recipes import same_inputs
from recyclable.recipes.inputs import inputs
from recyclable.recipes.pretrain_settings import read_pretrain_settings
from recyclable.recipes.recycle_settings import read_recycle_settings
from recyclable.recipes.same_inputs import require_same_inputs
from recyclable.recipes.stack_settings import read_stack_settings

TRAINED = {"max_steps": 1, "learning_rate": 1.0, "out": "out"}


@pytest.fixture(scope="module")
def chain(tmp_path_factory) -> Chain:
    folder = tmp_path_factory.mktemp("chain")
    chain = Chain(folder)
    make_outdated(chain.base, chain.task, folder / "tuned")
    make_corpus(folder / "corpus")
    return chain


def names(settings: Any) -> dict[str, set[str]]:
    return {field: {path.name for path in paths} for field, paths in inputs(settings).items()}


def test_a_run_of_each_kind_reads_what_its_settings_name(chain):
    splits, model = {"train.jsonl", "dev.jsonl", "test.jsonl"}, {"config.json", "model.safetensors", "tokenizer.json"}
    bases = {"base": str(chain.upgraded), "old_base": str(chain.base)}
    run = {**TRAINED, **bases, "method": "both", "weights": str(chain.folder / "tuned"), "task": str(chain.task)}
    found = names(read_recycle_settings(run, "run.yaml"))
    assert found.keys() == {"base", "old_base", "weights", "task"} and found["task"] == splits
    assert model <= found["old_base"] and model | {"lineage.json"} <= found["base"]
    assert {"manifest.json", "delta.safetensors", "head.safetensors"} <= found["weights"]

    corpus = {"train": str(chain.folder / "corpus"), "heldout": str(chain.folder / "corpus" / "train.txt")}
    run = {**TRAINED, "base": str(chain.base), "teacher": str(chain.upgraded), "corpus": corpus}
    run["replay"] = {"corpus": corpus["train"], "share": 0.5}
    found = names(read_pretrain_settings(run, "run.yaml"))
    assert found.keys() == {"base", "teacher", "corpus.train", "corpus.heldout", "replay.corpus.train"}
    assert found["replay.corpus.train"] == {"train.txt"}

    rest = {key: value for key, value in TRAINED.items() if key != "out"}
    run = {"out": "out", "base": str(chain.base), "shared": rest, "runs": {"a": {"task": str(chain.task)}}}
    assert names(read_stack_settings(run, "run.yaml"))["runs.a.task"] == splits


def test_a_task_file_counts_with_the_files_that_it_names(chain, tmp_path):
    (tmp_path / "mine.yaml").write_text(f"train: {chain.task / 'train.jsonl'}\ndev: {chain.task / 'dev.jsonl'}\n")
    assert names({"task": str(tmp_path / "mine.yaml")}) == {"task": {"mine.yaml", "train.jsonl", "dev.jsonl"}}


class Meeting:
    """Two threads as ranks 0 and 1, on hosts a and b."""

    size = 2
    _told: ClassVar[list[Any]] = [None, None]
    _both: ClassVar[Barrier] = Barrier(2, timeout=30)
    _own: ClassVar[local] = local()

    @property
    def rank(self) -> int:
        return self._own.rank

    def gather(self, value: Any) -> list[Any]:
        self._told[self.rank] = value
        self._both.wait()
        found = list(self._told)
        self._both.wait()
        return found

    @classmethod
    def problem(cls, rank: int, task: Path) -> str:
        """What this rank ends with."""
        cls._own.rank = rank
        try:
            require_same_inputs({"task": str(task)})
        except InputError as error:
            return str(error)
        return ""


def problems(monkeypatch: pytest.MonkeyPatch, *tasks: Path) -> list[str]:
    """What the ranks of hosts a and b end with, by the task that each of them finds."""
    monkeypatch.setattr(distributed, "Ranks", Meeting)
    monkeypatch.setattr(distributed, "say", lambda line: None)
    monkeypatch.setattr(same_inputs, "hosts", lambda: ["a", "b"])
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(Meeting.problem, (0, 1), tasks))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda task: (task / "dev.jsonl").write_text("{}\n"), "task: dev.jsonl on b is not the same as on a"),
        (lambda task: (task / "dev.jsonl").unlink(), "task: b has no dev.jsonl, which a has: copy it there"),
        (lambda task: (task / "dev.csv").write_text("text,label\n"), "task: "),
        (shutil.rmtree, "on b: no such file or directory"),
        (lambda task: None, ""),
    ],
    ids=["changed", "missing", "two of a kind", "no task", "the same"],
)
def test_a_host_whose_files_differ_is_named_on_every_rank(chain, tmp_path, monkeypatch, change, problem):
    there = Path(shutil.copytree(chain.task, tmp_path / "task"))
    change(there)
    first, second = problems(monkeypatch, chain.task, there)
    assert first == second and problem in first and bool(first) == bool(problem)


def test_what_the_system_says_of_a_file_of_one_host_is_said_on_every_rank(chain, tmp_path, monkeypatch):
    def denied(settings: dict[str, str]) -> Any:
        if settings["task"] == str(tmp_path):
            raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path))
        return inputs(settings)

    monkeypatch.setattr(same_inputs, "inputs", denied)
    told = f"{tmp_path}: on b: cannot be read (Permission denied)"
    assert problems(monkeypatch, chain.task, tmp_path) == [told, told]
