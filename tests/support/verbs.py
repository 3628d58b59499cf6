"""Runs the `recyclable` command in this process, for tests of what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from recyclable.cli import main

TRAINING = {"max_steps": 1, "learning_rate": 1e-3, "train_batch_size": 4, "max_length": 24, "save_every": 0}


class Verbs:
    """The command in a directory of its own: `tmp`, where results go to `out`."""

    def __init__(self, tmp: Path, capsys: pytest.CaptureFixture) -> None:
        self.tmp, self.out, self._capsys = tmp, tmp / "out", capsys

    def training(self, verb: str, **settings: object) -> list[object]:
        """The arguments of a training verb with a run.yaml of these settings, written now."""
        common = {"max_length": TRAINING["max_length"]} if settings.get("method") == "apply" else TRAINING
        content = {"out": self.out, **common, **settings}
        path = self.tmp / "run.yaml"
        path.write_text(yaml.safe_dump({k: str(v) if isinstance(v, Path) else v for k, v in content.items()}))
        return [verb, path]

    def run(self, *argv: object) -> tuple[int, list[str]]:
        """Exit status and lines on standard error."""
        self._capsys.readouterr()
        status = main([str(argument) for argument in argv])
        return status, self._capsys.readouterr().err.strip().splitlines()

    def refused(self, *argv: object) -> str:
        """The one line that the command refuses with; it writes nothing."""
        before = sorted(self.tmp.rglob("*"))
        status, said = self.run(*argv)
        assert (status, len(said)) == (2, 1), said
        assert sorted(self.tmp.rglob("*")) == before
        return said[0]
