"""What of a task a run uses: shots, and limits of the splits that are scored."""

from __future__ import annotations

from pathlib import Path

from worlds import make_base, make_task

from recyclable.recipes.tune_settings import read_tune_settings
from recyclable.tasks.parts.task import load_task
from recyclable.tasks.parts.task_data import task_data
from recyclable.weights.base import Base
from recyclable.weights.reader import Reader


def test_dev_and_test_are_limited_to_fixed_subsets(tmp_path: Path) -> None:
    base, task = make_base(tmp_path / "base"), make_task(tmp_path / "task")
    given = {"base": str(base), "task": str(task), "out": tmp_path / "out", "max_steps": 1, "learning_rate": 1e-3}

    def sizes(**limits: int) -> list[int]:
        settings = read_tune_settings({**given, "max_length": 32, **limits}, "tune.yaml")
        data = task_data(settings, load_task(task), Reader.of(Base(base)))
        return [len(data.train), len(data.dev), len(data.test)]

    train, dev, test = sizes()
    assert sizes(max_dev_examples=5) == [train, 5, test]
    assert sizes(max_test_examples=7) == [train, dev, 7]
    assert sizes(max_test_examples=test + 1) == [train, dev, test]
