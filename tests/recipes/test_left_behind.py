"""What a verb leaves behind when it fails: nothing, before it has got anywhere."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import BertModel
from verbs import Verbs
from worlds import Chain, make_corpus, make_outdated

from recyclable.training import loop


class Failure(Exception):
    """What ends a verb in its middle."""


class World(Chain):
    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.weights = make_outdated(self.base, self.task, folder / "weights")
        self.corpus = make_corpus(folder / "corpus", documents=20)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture
def verbs(tmp_path: Path, capsys: pytest.CaptureFixture) -> Verbs:
    return Verbs(tmp_path, capsys)


def argv(verbs: Verbs, world: World, run: str, **settings: Any) -> list[object]:
    """The arguments of a verb, or of a method of recycling."""
    settings = {"out": verbs.out, **settings}
    if run == "pretrain":
        return verbs.training(run, base=world.base, corpus={"train": str(world.corpus)}, **settings)
    if run == "probe":
        given = ["--weights", world.weights, "--base", world.upgraded, "--old-base", world.base, "--task", world.task]
        return [run, *given, "--out", verbs.out]
    if run == "tune":
        return verbs.training(run, base=world.base, task=world.task, **settings)
    given = {"base": world.upgraded, "old_base": world.base, "weights": world.weights, "task": world.task}
    return verbs.training("recycle", **given, method=run, **settings)


def fails(*_: object, **__: object) -> None:
    raise Failure


def failed(verbs: Verbs, *arguments: object) -> set[str]:
    """What a verb that ends in the failure has made, run.yaml aside."""
    try:
        status, _ = verbs.run(*arguments)
        assert status == 1
    except Failure:
        pass
    return {str(path.relative_to(verbs.tmp)) for path in verbs.tmp.rglob("*")} - {"run.yaml"}


RUNS = ["tune", "pretrain", "init", "distill", "both", "apply", "probe"]


@pytest.mark.parametrize("run", RUNS)
def test_a_model_whose_forward_fails(run: str, verbs: Verbs, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BertModel, "forward", fails)
    assert failed(verbs, *argv(verbs, world, run)) == set()
    verbs.out.mkdir()
    assert failed(verbs, *argv(verbs, world, run)) == {"out"}
    monkeypatch.undo()
    assert verbs.run(*argv(verbs, world, run))[0] == 0  # the same directory serves


@pytest.mark.parametrize("run", ["tune", "pretrain", "both"])
def test_a_first_evaluation_that_fails(run: str, verbs: Verbs, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "_evaluate", fails)
    deep = {"out": verbs.tmp / "far" / "out"}
    assert failed(verbs, *argv(verbs, world, run, **deep)) == set()


def test_what_was_trained_stays(verbs: Verbs, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recyclable.recipes.tune.save_learned", fails)
    left = failed(verbs, *argv(verbs, world, "tune", max_steps=2, save_every=1))
    assert {"out/run.json", "out/checkpoints/step-00000002/complete.json"} <= left
    monkeypatch.undo()
    assert verbs.run(*argv(verbs, world, "tune", max_steps=2, save_every=1), "--resume")[0] == 0


def test_a_teacher_that_fails_leaves_no_cache(verbs: Verbs, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = {"teacher_cache": verbs.tmp / "answers"}
    with monkeypatch.context() as patch:
        patch.setattr(BertModel, "forward", fails)
        assert failed(verbs, *argv(verbs, world, "both", **cache)) == set()
    with monkeypatch.context() as patch:
        patch.setattr("recyclable.objectives.teacher_cache.sha256_file", fails)  # written, but without a name
        assert failed(verbs, *argv(verbs, world, "both", **cache)) == set()
    with monkeypatch.context() as patch:
        patch.setattr(loop, "_evaluate", fails)  # answers that are whole serve the next run
        left = failed(verbs, *argv(verbs, world, "both", **cache))
    assert {Path(path).suffix for path in left if "." in path} == {".json", ".safetensors"}
    assert not any(path.startswith("out") for path in left)
    shutil.rmtree(verbs.tmp / "answers")
