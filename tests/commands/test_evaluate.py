"""`recyclable evaluate --plot`: where it cannot be drawn is said before anything is scored."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from worlds import make_base, make_outdated, make_task

from recyclable.cli import main


def test_a_plot_is_refused_before_scoring_and_drawn_behind_the_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    base, task = make_base(tmp_path / "base"), make_task(tmp_path / "task", train=9, dev=9, test=9)
    weights = make_outdated(base, task, tmp_path / "weights")
    manifest = json.loads((weights / "manifest.json").read_text())
    manifest["metrics"]["metric"], manifest["history"] = "accuracy", [{"step": 0}]
    (weights / "manifest.json").write_text(json.dumps(manifest))
    command = ["evaluate", "--weights", str(weights), "--base", str(base), "--task", str(task), "--plot"]
    for place in ("/nope/x.png", str(tmp_path / "x.foo")):
        with monkeypatch.context() as patch:
            patch.setattr("recyclable.recipes.evaluate.evaluate", lambda *_, **__: pytest.fail("scored"))
            assert main([*command, place]) == 2
        said = capsys.readouterr()
        assert said.out == "" and said.err.startswith("recyclable: error: --plot: ") and said.err.count("\n") == 1
    assert main([*command, str(tmp_path / "x.png")]) == 0
    assert "test_accuracy" in capsys.readouterr().out
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
