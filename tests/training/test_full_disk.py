"""A disk of any size that is too small for a run ends it in one line, and the last good checkpoint is whole."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from processes import finish, start
from verbs import Verbs
from worlds import make_base, make_outdated, make_task

from recyclable.training.monitor import Monitor

STEPS, EVERY = 6, 2
# KB, from none at all to all that is needed: the best step's weights take 130, a checkpoint 400, the result 280.
SIZES = (4, 16, 64, 128, 256, 400, 512, 640, 768, 896, 1024, 1152, 1280, 1408, 1536, 1792, 2048)

VERB_SIZES = (4, 112, 120, 128, 136, 400)
"""The same for verbs that do not train: tensors take 112, the tokenizer 5."""


@pytest.fixture(scope="module")
def disks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a disk of its own for each size."""
    root = tmp_path_factory.mktemp("disks")
    mounted = []
    try:
        named = {f"disk-{size}": size for size in SIZES} | {f"verb-{size}": size for size in VERB_SIZES}
        for name, size in named.items():
            disk = root / name
            disk.mkdir()
            command = ["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", str(disk)]
            if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
                if os.environ.get("CI"):
                    pytest.fail("no disk can be mounted")
                pytest.skip("no disk can be mounted here")
            mounted.append(disk)
        yield root
    finally:
        for disk in mounted:
            subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.fixture(scope="module")
def world(disks: Path) -> Path:
    """Runs on two ranks on each of the disks, then those that failed once more with room enough."""
    make_base(disks / "base")
    make_task(disks / "task")
    finish(start(disks / "first", [run(disks, size) for size in SIZES], nproc=2), disks / "first")
    return disks


def run(root: Path, size: int, **how: Any) -> dict[str, Any]:
    config = {
        **{"out": root / f"disk-{size}" / "out", "base": root / "base", "task": str(root / "task")},
        **{"max_steps": STEPS, "train_batch_size": 8, "learning_rate": 2e-3, "max_length": 16, "dropout": 0.0},
        **{"eval_every": STEPS, "save_every": EVERY, "log_every": 1},
    }
    outcome = root / f"outcome-{size}"
    return {
        "verb": "tune",
        "config": config,
        "ds_config": {"zero_optimization": {"stage": 2}},
        "outcome": outcome,
        **how,
    }


def outcome(root: Path, size: int) -> dict[str, str]:
    return json.loads((root / f"outcome-{size}.json").read_text())


def test_each_run_ends_well_or_in_one_line_of_what_is_wrong(world: Path) -> None:
    ended = [outcome(world, size) for size in SIZES]
    failed = [each for each in ended if each]
    assert len(failed) >= 10 and ended[-1] == {}, "the sizes are no longer those of the runs"
    for each in failed:
        assert each["error"] in ("InputError", "RunError"), each
        assert "No space left on device" in each["message"] and "\n" not in each["message"], each
    assert len({each["message"].partition(":")[0] for each in failed}) >= 3, "not only one place was met"
    assert "Traceback" not in (world / "first" / "log").read_text()


def test_what_is_marked_as_whole_is_whole(world: Path) -> None:
    for size in SIZES:
        out = world / f"disk-{size}" / "out"
        assert (out / "manifest.json").exists() == (outcome(world, size) == {}), size
        for folder in out.glob("checkpoints/step-*"):
            assert (folder / "complete.json").is_file(), folder


def test_with_more_room_the_run_goes_on_from_its_checkpoint(world: Path) -> None:
    failed = [size for size in SIZES if outcome(world, size)]
    with_checkpoint = [size for size in failed if list((world / f"disk-{size}" / "out").glob("checkpoints/step-*"))]
    assert with_checkpoint, "none failed after its first checkpoint"
    for size in with_checkpoint:
        options = f"remount,size={SIZES[-1] * 2}k"
        subprocess.run(["mount", "-o", options, str(world / f"disk-{size}")], check=True)
    finish(
        start(world / "second", [run(world, size, resume=True) for size in with_checkpoint], nproc=2), world / "second"
    )
    whole = (world / f"disk-{SIZES[-1]}" / "out" / "delta.safetensors").read_bytes()
    for size in with_checkpoint:
        assert outcome(world, size) == {}
        assert (world / f"disk-{size}" / "out" / "delta.safetensors").read_bytes() == whole
    assert "resumed at step 2" in (world / "second" / "log").read_text()


# ---- gone, or read-only


@pytest.mark.parametrize("size", VERB_SIZES)
def test_other_verbs_end_in_one_line_on_a_disk_that_is_full_and_leave_nothing(
    disks: Path, tmp_path: Path, capsys: pytest.CaptureFixture, size: int
) -> None:
    base, task = make_base(tmp_path / "base"), make_task(tmp_path / "task")
    tuned, disk, verbs = make_outdated(base, task, tmp_path / "tuned"), disks / f"verb-{size}", Verbs(tmp_path, capsys)
    added = ["store", "add", "--tuned", tuned, "--base", base, "--name", "one", "--store"]
    assert verbs.run(*added, tmp_path / "store") == (0, [])
    exported = ["store", "export", "one", "--store", tmp_path / "store", "--merged", "--base", base, "--out"]
    applied = ["apply", "--weights", tuned, "--base", base, "--out"]
    for command in (added, exported, applied):
        status, told = verbs.run(*command, disk / "made")
        assert (status, len(told)) in {4: [(1, 1)], 400: [(0, 0)]}.get(size, [(0, 0), (1, 1)]), told
        assert all("No space left" in line for line in told) and (status == 0 or not list(disk.glob("made/*")))
        shutil.rmtree(disk / "made", ignore_errors=True)
        assert list(disk.iterdir()) == []


@pytest.mark.parametrize("save_every", [2, 0])
def test_a_directory_that_is_gone_under_a_run_ends_it_in_one_line_and_is_not_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, save_every: int
) -> None:
    base, task = make_base(tmp_path / "base"), make_task(tmp_path / "task")
    verbs, taken = Verbs(tmp_path, capsys), Monitor.step

    def lost(self: Monitor, step: int, *losses: Any) -> None:
        taken(self, step, *losses)
        if step == 3:
            shutil.rmtree(verbs.out)

    monkeypatch.setattr(Monitor, "step", lost)
    run = {"base": base, "task": task, "max_steps": 6, "eval_every": 6, "log_every": 6, "save_every": save_every}
    status, said = verbs.run(*verbs.training("tune", **run))
    assert (status, len(said)) == (1, 1) and said[0].startswith("recyclable: error: "), said
    assert re.search("its directory is gone|No such file or directory|is missing", said[0]), said
    assert not verbs.out.exists()


def test_a_disk_that_takes_nothing_is_refused_before_anything_is_trained(
    disks: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    base, task, disk = make_base(tmp_path / "base"), make_task(tmp_path / "task"), disks / "read-only"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(disk)], check=True)
    try:
        verbs = Verbs(tmp_path, capsys)
        said = verbs.refused(*verbs.training("tune", base=base, task=task, out=disk / "out"))
        assert "cannot be used (Read-only file system), expected a directory that can be written to" in said
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
