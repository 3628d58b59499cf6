"""Remembered fingerprints: what was computed last, as long as no file has changed; and what is quick by them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from processes import ROOT
from safetensors.torch import load_file, save_file
from worlds import make_base, make_outdated, make_task, make_upgraded

from recyclable.recipes.lineage import declare, show
from recyclable.weights.base import Base
from recyclable.weights.fingerprint import fingerprint
from recyclable.weights.remembered import recall, remember, stamp

SLOW = {"torch", "transformers", "deepspeed", "peft", "datasets"}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_base(tmp_path / "base")


def imported(*command: object, cwd: Path) -> set[str]:
    """What a command imports that takes seconds."""
    code = (
        "import sys; from recyclable.cli import main; status = main(sys.argv[1:]); "
        "print(*sys.modules, file=sys.stderr); sys.exit(status)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    argv = [sys.executable, "-c", code, *map(str, command)]
    done = subprocess.run(argv, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return SLOW & set(done.stderr.split())


def test_what_is_shown_the_second_time_is_what_was_computed_the_first(base: Path) -> None:
    assert recall(base) is None
    first = show(str(base))
    assert first["fingerprint"] == fingerprint(Base(base)).as_dict() == recall(base)
    assert show(str(base)) == first


def test_a_changed_file_is_computed_anew(base: Path) -> None:
    before = show(str(base))["fingerprint"]
    tensors = load_file(base / "model.safetensors")
    name = sorted(tensors)[0]
    save_file({**tensors, name: tensors[name] + 1}, base / "model.safetensors", metadata={"format": "pt"})
    assert recall(base) is None
    after = show(str(base))["fingerprint"]
    assert after["weights"] != before["weights"] and after["config"] == before["config"]


def test_a_file_with_the_times_and_size_of_the_old_one_is_noticed_all_the_same(base: Path) -> None:
    show(str(base))
    file, status = base / "config.json", (base / "config.json").stat()
    file.write_text(file.read_text().replace('"gelu"', '"relu"'))
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert file.stat().st_size == status.st_size and recall(base) is None


@pytest.mark.parametrize("broken", ["abc", {}, [], {"weights": 5}, {"weights": 5, "tokenizer": "t", "config": "c"}])
def test_a_record_that_is_no_fingerprint_is_none(base: Path, broken: Any) -> None:
    remember(base, stamp(base), broken)
    assert recall(base) is None
    assert show(str(base))["fingerprint"] == fingerprint(Base(base)).as_dict() == recall(base)


def test_what_changed_while_it_was_computed_is_not_remembered(base: Path) -> None:
    before = stamp(base)
    (base / "new.txt").write_text("meanwhile")
    remember(base, before, {"weights": "w", "tokenizer": "t", "config": "c"})
    assert recall(base) is None


def test_a_copy_elsewhere_has_a_record_of_its_own(base: Path, tmp_path: Path) -> None:
    show(str(base))
    shutil.copytree(base, tmp_path / "copy")
    assert recall(tmp_path / "copy") is None


def test_a_cache_that_cannot_be_written_is_none(base: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RECYCLABLE_CACHE", str(tmp_path / "file"))
    assert show(str(base))["fingerprint"]["weights"] and recall(base) is None


def test_listing_a_store_and_showing_a_known_lineage_import_nothing_slow(base: Path, tmp_path: Path) -> None:
    task = make_task(tmp_path / "task")
    make_outdated(base, task, tmp_path / "weights")
    make_upgraded(base, tmp_path / "child")
    (tmp_path / "child" / "lineage.json").unlink()
    declare(str(tmp_path / "child"), str(base))
    assert imported("store", "add", "--tuned", "weights", "--name", "mine", cwd=tmp_path) >= {"torch"}
    for command in (["store", "ls", "--json"], ["lineage", "show", "child", "--json"], ["lineage", "show", "base"]):
        assert imported(*command, cwd=tmp_path) == set(), command
    for command in (["--help"], ["recycle", "--help"], ["methods"]):
        code = "import sys; from recyclable.cli import main\ntry: main(sys.argv[1:])\nexcept SystemExit: pass\n"
        code += "print(*sys.modules, file=sys.stderr)"
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run([sys.executable, "-c", code, *command], env=environment, capture_output=True, text=True)
        assert not SLOW & set(done.stderr.split()), command
