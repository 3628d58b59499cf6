"""The quickstart on the user's own base, corpus and task: table, plot, JSON, and what it refuses. (In small.)"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from worlds import make_base, make_corpus, make_task

from recyclable.cli import main
from recyclable.recipes import quickstart as module

TINY = {"max_steps": 2, "train_batch_size": 8, "max_length": 32, "save_every": 0}


@pytest.fixture
def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(module, "_PRETRAIN", TINY)
    monkeypatch.setattr(module, "_TUNE", {**TINY, "eval_every": 1})
    monkeypatch.setattr(module, "_FEW_SHOT", {**TINY, "eval_every": 1})
    base, corpus, task = make_base(tmp_path / "b"), make_corpus(tmp_path / "c"), make_task(tmp_path / "t")
    own = ["--base", str(base), "--corpus", str(corpus), "--task", str(task)]
    return ["quickstart", "--nproc", "1", "--out", str(tmp_path / "out"), *own]


def test_it_ends_with_the_promised_json_and_shows_table_and_plot(arguments, tmp_path, capsys):
    assert main([*arguments, "--json"]) == 0
    lines = capsys.readouterr().out.splitlines()
    result = json.loads(lines[-1])
    assert set(result) == {"methods", "out"} and result["out"] == str(tmp_path / "out")
    assert set(result["methods"]) == {"scratch", "init", "distill", "both"}
    for row in result["methods"].values():
        assert set(row) == {"test", "dev_best", "steps_to_target"}
        assert 0 <= row["test"] <= 1 and 0 <= row["dev_best"] <= 1
    assert any(line.startswith("| scratch") for line in lines) and any(line.startswith("| apply") for line in lines)
    assert (tmp_path / "out" / "methods.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "out" / "data").exists(), "nothing of its own is collected where all three are given"


def test_it_goes_on_where_it_was_but_not_with_other_parts(arguments, tmp_path, capsys):
    assert main(arguments) == 0
    manifests = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("manifest.json")}
    assert main(arguments) == 0
    assert {path: path.stat().st_mtime_ns for path in manifests} == manifests
    other = make_task(tmp_path / "other", seed=99)
    capsys.readouterr()
    assert main([*arguments[:-1], str(other)]) == 2
    assert "holds a quickstart with other parts" in capsys.readouterr().err


def test_a_directory_with_something_else_in_it_is_left_alone(arguments, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    assert main(arguments) == 2
    assert "is not empty and holds no quickstart" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.tex"]
