"""A run stops early where HF's callback would have stopped it, and is until then the run that never stops."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from processes import finish, outcome, start
from safetensors.torch import load_file
from this_process import own_environment
from transformers import EarlyStoppingCallback, TrainerControl, TrainerState
from worlds import make_base, make_task

from recyclable.api import tune
from recyclable.config.settings import LearnSettings
from recyclable.errors import InputError
from recyclable.training import best, loop
from recyclable.training.early_stopping import stopped
from recyclable.weights.manifest import ADAPTER, read_manifest

STEPS, EVERY, PATIENCE = 24, 2, 2
SEED = 4  # with which scores rise, and then do not for a while


@pytest.fixture(scope="module", autouse=True)
def environment() -> Iterator[None]:
    with own_environment():
        yield


def callbacks_stop(scores: list[float], patience: int, threshold: float) -> int | None:
    """The evaluation, from 0, at which HF's callback stops; None: at none. Its Trainer keeps the best beside it."""
    callback, state = EarlyStoppingCallback(patience, threshold), TrainerState()
    args = SimpleNamespace(metric_for_best_model="score", greater_is_better=True)
    for number, score in enumerate(scores):
        control = TrainerControl()
        callback.on_evaluate(args, state, control, metrics={"eval_score": score})
        state.best_metric = score if state.best_metric is None else max(state.best_metric, score)
        if control.should_training_stop:
            return number
    return None


def settings(**given: Any) -> LearnSettings:
    return LearnSettings(out=Path("out"), max_steps=9, learning_rate=1.0, base="b", task="t", **given)


def test_a_run_stops_at_the_evaluation_at_which_the_callback_of_transformers_stops() -> None:
    draw, found = random.Random(1), set()
    for _ in range(300):
        scores = [draw.choice((0.25, 0.5, 0.625, 0.75)) + number / 16 for number in range(12)]
        patience, threshold = draw.randint(1, 5), draw.choice((0.0, 0.125, 0.5))
        own = settings(early_stopping_patience=patience, early_stopping_threshold=threshold)
        history = [{"step": step, "score": score} for step, score in enumerate(scores)]
        ours = next((n for n in range(12) if stopped(history[: n + 1], own, "score")), None)
        assert ours == callbacks_stop(scores, patience, threshold), (scores, patience, threshold)
        found.add(ours)
    assert {None, 1, 2, 5} <= found


def test_without_patience_no_run_stops_and_a_threshold_that_nothing_reads_is_refused(tmp_path: Path) -> None:
    assert not stopped([{"score": 0.5}] * 50, settings(), "score")
    with pytest.raises(ValueError, match="nothing reads it without early_stopping_patience"):
        settings(early_stopping_threshold=0.1)
    with pytest.raises(InputError, match="early_stopping_patience"):
        tune(base="b", task="t", out=str(tmp_path / "out"), max_steps=1, learning_rate=1.0, early_stopping_patience=0)


class World:
    """A base, its task, and runs on it that may stop."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.base, self.task = make_base(folder / "base"), make_task(folder / "task")
        self.tune("whole")
        self.whole = read_manifest(folder / "whole")
        scores = [row[self.whole.metrics["metric"]] for row in self.whole.history]
        number = callbacks_stop(scores, PATIENCE, 0.0)
        assert number is not None and PATIENCE < number < len(scores) - 1, scores  # it learns before, and does not end
        self.stop = number * EVERY
        self.best = max(range(number + 1), key=scores.__getitem__) * EVERY

    def config(self, out: str, **given: Any) -> dict[str, Any]:
        run = {"tuning": "lora", "base": str(self.base), "task": str(self.task), "out": str(self.folder / out)}
        steps = {"max_steps": STEPS, "eval_every": EVERY, "save_every": 0, "train_batch_size": 8, "max_length": 24}
        return {**run, **steps, "learning_rate": 2e-2, "seed": SEED, "dropout": 0.0, **given}

    def tune(self, out: str, resume: bool = False, **given: Any) -> dict[str, Any]:
        return tune(resume=resume, **self.config(out, **given))

    def require_stopped(self, out: str) -> None:
        """It is the whole run up to where the callback stops, and kept what was the best by then."""
        told = read_manifest(self.folder / out)
        rows, expected = ([{**row, "seconds": 0} for row in each.history] for each in (told, self.whole))
        for row, other in zip(rows, expected[: self.stop // EVERY + 1], strict=True):
            assert row == pytest.approx(other, abs=1e-6)
        assert (told.metrics["stopped_early_at"], told.metrics["best_step"]) == (self.stop, self.best)
        assert told.metrics["examples"] == 8 * self.stop
        assert not (self.folder / out / "checkpoints").exists() and not list((self.folder / out).glob("best-*"))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("early"))


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The steps that are taken, from 0."""
    steps: list[int] = []
    original: Callable[..., Any] = loop.train_step

    def step(engine: Any, objective: Any, fed: Any, number: int, *rest: Any, **more: Any) -> Any:
        steps.append(number)
        return original(engine, objective, fed, number, *rest, **more)

    monkeypatch.setattr(loop, "train_step", step)
    return steps


def test_it_stops_exactly_where_patience_ends_and_keeps_the_best_so_far(world: World, taken: list[int]) -> None:
    metrics = world.tune("stops", early_stopping_patience=PATIENCE)
    assert taken == list(range(world.stop))
    assert metrics == read_manifest(world.folder / "stops").metrics
    world.require_stopped("stops")
    assert "stopped_early_at" not in world.whole.metrics
    taken.clear()
    assert world.tune("stops", resume=True, early_stopping_patience=PATIENCE) == metrics and not taken


def test_no_score_is_better_by_more_than_a_threshold_that_none_can_reach(world: World, taken: list[int]) -> None:
    world.tune("threshold", early_stopping_patience=3, early_stopping_threshold=1.0)
    assert taken == list(range(3 * EVERY))


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_run_that_is_interrupted_stops_where_it_would_have(
    world: World, taken: list[int], monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    given = {"early_stopping_patience": PATIENCE, "save_every": 1}

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        if when == "before":
            original, last = loop._evaluate, world.stop - EVERY

            def evaluate(engine: Any, of: Any, progress: Any, *rest: Any) -> None:
                original(engine, of, progress, *rest)
                if progress.step == last:
                    interrupt()

            patched.setattr(loop, "_evaluate", evaluate)
        else:
            patched.setattr(best, "result", interrupt)
        with pytest.raises(KeyboardInterrupt):
            world.tune(when, **given)
    done = len(taken)
    assert done == (world.stop - EVERY if when == "before" else world.stop)
    world.tune(when, resume=True, **given)
    assert taken[done:] == ([done - 1, done, done + 1] if when == "before" else [])
    world.require_stopped(when)
    one, other = (load_file(world.folder / out / ADAPTER) for out in (when, "stops"))
    assert all(torch.equal(one[name], other[name]) for name in other)


def test_all_ranks_stop_at_the_same_step(world: World) -> None:
    config = world.config("ranks", early_stopping_patience=PATIENCE, early_stopping_threshold=1.0)
    folder = world.folder / "launched"
    finish(start(folder, [{"verb": "tune", "config": config, "ds_config": {}}], nproc=2), folder)
    assert outcome(world.folder / "ranks") == {}
    told = read_manifest(world.folder / "ranks")
    assert [row["step"] for row in told.history] == [0, EVERY, 2 * EVERY]
    assert (told.metrics["stopped_early_at"], told.metrics["examples"]) == (2 * EVERY, 8 * 2 * EVERY)
