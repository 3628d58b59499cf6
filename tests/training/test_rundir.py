"""A run's directory: what cannot be made or is damaged is refused in one line, and nothing of the trial stays."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from faults import killed_at

from recyclable.config.settings import Settings
from recyclable.errors import InputError, RunError
from recyclable.training import lock, rundir


@pytest.mark.parametrize("place", ["/proc/foo/x", "/dev/null/x", "{tmp}/a\0b", "{tmp}/" + "x" * 300])
@pytest.mark.parametrize("claims", [True, False])
def test_a_directory_that_cannot_be_made_is_refused(place: str, claims: bool, tmp_path: Path) -> None:
    folder = Path(place.replace("{tmp}", str(tmp_path)))
    with pytest.raises(InputError, match=r"^out: .* cannot be used \(.+\), expected a directory"):
        if claims:
            with rundir.claim(Settings(), folder, "manifest.json", resume=False):
                pass
        else:
            rundir.require_writable("out", folder)
    assert not list(tmp_path.iterdir())


def test_trying_a_directory_leaves_none(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    for folder in (tmp_path / "there", tmp_path / "there" / "new", tmp_path / "far" / "off"):
        rundir.require_writable("out", folder)
    assert list(tmp_path.rglob("*")) == [tmp_path / "there"]


@pytest.mark.parametrize("text", ["[]", '"x"', "null", "{}", "{", "\xff"])
def test_a_damaged_record_of_the_run_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_bytes(text.encode("latin1"))
    with (
        pytest.raises(InputError, match=r"run\.json: (broken JSON|is empty|is not UTF-8)"),
        rundir.claim(Settings(), tmp_path, "manifest.json", resume=True),
    ):
        pass
    assert (tmp_path / "run.json").read_bytes() == text.encode("latin1")


# ---- what a run leaves behind


class One(Settings):
    """A run of one setting."""

    x: int = 1


class Two(Settings):
    """A run with settings in sections."""

    one: One = One()


class Failure(Exception):
    """What ends a run."""


def fail(out: Path, *files: str, resume: bool = False) -> None:
    """A run that writes files, then fails."""
    with pytest.raises(Failure), rundir.claim(Settings(), out, "manifest.json", resume):
        assert (out / "run.json").is_file()
        for file in files:
            (out / file).parent.mkdir(parents=True, exist_ok=True)
            (out / file).write_text("x")
        raise Failure


@pytest.mark.parametrize(
    "files",
    [
        (),
        ("tensorboard/events",),
        ("best-00000000.safetensors", ".best-00000010.safetensors.partial"),
        ("checkpoints/.partial-step-00000002/complete.json", "delta.safetensors"),
        ("head/best-00000000.safetensors",),
    ],
)
def test_a_run_that_fails_before_it_has_got_anywhere_leaves_nothing(files: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    for out in (tmp_path / "there", tmp_path / "there" / "a" / "b", tmp_path / "new"):
        fail(out, *files)
        assert list(tmp_path.rglob("*")) == [tmp_path / "there"]


@pytest.mark.parametrize(
    "file",
    [
        "checkpoints/step-00000002/complete.json",
        "best-00000010.safetensors",
        "best-10000000.safetensors",
        "head/best-00000003.safetensors",
        "manifest.json",
    ],
)
def test_a_run_that_fails_later_keeps_all_it_has(file: str, tmp_path: Path) -> None:
    fail(tmp_path / "out", "tensorboard/events", file)
    kept = {str(path.relative_to(tmp_path / "out")) for path in tmp_path.rglob("*") if path.is_file()}
    assert kept == {"run.json", "tensorboard/events", file}


def test_a_resumed_run_that_fails_keeps_what_was_there_and_is_resumed_again(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"x": 1}')  # what a killed run left
    (tmp_path / "tensorboard").mkdir()
    for _ in range(2):
        with pytest.raises(Failure), rundir.claim(One(), tmp_path, "manifest.json", resume=True) as unfinished:
            assert unfinished
            raise Failure
        assert {path.name for path in tmp_path.iterdir()} == {"run.json", "tensorboard"}


@pytest.mark.parametrize("ended", [KeyboardInterrupt, SystemExit, InputError("x", "y")])
def test_however_it_ends(ended: BaseException, tmp_path: Path) -> None:
    with pytest.raises(BaseException), rundir.claim(Settings(), tmp_path / "out", "manifest.json", False):  # noqa: B017
        raise ended
    assert not list(tmp_path.iterdir())


def test_what_was_there_before_and_is_no_run_is_neither_used_nor_removed(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with (
        pytest.raises(InputError, match="is not empty and holds no run of recyclable"),
        rundir.claim(Settings(), tmp_path, "manifest.json", resume=False),
    ):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_finished_run_is_told_and_left_alone(tmp_path: Path) -> None:
    with rundir.claim(One(), tmp_path, "manifest.json", resume=False) as unfinished:
        assert unfinished
        (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(Failure), rundir.claim(One(), tmp_path, "manifest.json", resume=True) as unfinished:
        assert not unfinished
        raise Failure
    assert {path.name for path in tmp_path.iterdir()} == {"run.json", "manifest.json"}


# ---- one run at a time


def claiming(out: Path, resume: bool, told: Any, gate: Any) -> None:
    """What became of a claim by a process of its own; an admitted one keeps the directory until the gate opens."""
    try:
        with rundir.claim(One(), out, "manifest.json", resume):
            told.put("admitted")
            gate.wait(60)
            raise Failure
    except InputError as error:
        told.put(str(error))
    except Failure:
        pass


@pytest.mark.parametrize("begun", [True, False])
def test_of_several_runs_in_one_directory_one_is_let_in(begun: bool, tmp_path: Path) -> None:
    out, here = tmp_path / "out", multiprocessing.get_context("fork")
    if begun:  # by a run that was killed
        out.mkdir()
        (out / "run.json").write_text('{"x": 1}')
        (out / ".lock").write_text("process 1 on this host")
    told, gate = here.Queue(), here.Event()
    claims = [here.Process(target=claiming, args=(out, begun, told, gate)) for _ in range(4)]
    for claim in claims:
        claim.start()
    found = sorted(told.get(timeout=60) for _ in claims)
    gate.set()
    for claim in claims:
        claim.join(60)
    assert found.pop(0) == "admitted"
    refused = r"out: .* (is in use by process \d+ on .+: wait for its end, or end it|holds a run already.*)"
    assert all(re.fullmatch(refused, line) for line in found), found
    assert {path.name for path in tmp_path.rglob("*")} == ({"out", "run.json"} if begun else set())


def test_the_lock_ends_with_its_process(tmp_path: Path) -> None:
    holder = os.fork()
    if holder == 0:
        with lock.locked(tmp_path):
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(holder, 0)
    assert (tmp_path / ".lock").exists()
    in_use = f"is in use by process {os.getpid()} on "
    with lock.locked(tmp_path), pytest.raises(InputError, match=in_use), lock.locked(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_a_run_that_is_started_again_waits_for_the_lock_of_a_lost_host(tmp_path: Path, monkeypatch) -> None:
    other = os.open(tmp_path / ".lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(other, fcntl.LOCK_EX)
    monkeypatch.setattr(lock.time, "sleep", lambda _: fcntl.flock(other, fcntl.LOCK_UN))  # the file server gives it up
    monkeypatch.setenv("RECYCLABLE_RESTART", "1")
    with rundir.claim(One(), tmp_path, "manifest.json", False) as unfinished:
        assert unfinished
    os.close(other)


def test_a_lock_that_is_held_on_is_no_bad_input_to_who_has_waited_for_it(tmp_path: Path, monkeypatch) -> None:
    now = [0.0]
    monkeypatch.setattr(lock.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(lock.time, "sleep", lambda seconds: now.append(now.pop() + seconds))
    monkeypatch.setenv("RECYCLABLE_RESTART", "2")
    with lock.locked(tmp_path), pytest.raises(RunError, match="is in use by"), lock.locked(tmp_path, lock.patience()):
        pass
    assert 90 < now[0] < 300


@pytest.mark.parametrize("resume", [True, False])
def test_a_directory_whose_run_died_before_it_began_is_free(resume: bool, tmp_path: Path) -> None:
    for name in (".lock", ".seen-0123456789abcdef", ".run.json.partial"):
        (tmp_path / name).write_text("x")
    with rundir.claim(One(), tmp_path, "manifest.json", resume) as unfinished:
        assert unfinished
        assert {path.name for path in tmp_path.iterdir()} == {"run.json", ".lock"}
        (tmp_path / "manifest.json").write_text("{}")
    assert {path.name for path in tmp_path.iterdir()} == {"run.json", "manifest.json"}


def test_what_a_run_left_that_died_after_its_result_goes_when_it_is_resumed(tmp_path: Path) -> None:
    with rundir.claim(One(), tmp_path, "manifest.json", False):
        (tmp_path / "manifest.json").write_text("{}")
        (tmp_path / "checkpoints" / "step-00000002").mkdir(parents=True)
        (tmp_path / "best-00000002.safetensors").write_text("x")
    with rundir.claim(One(), tmp_path, "manifest.json", resume=True) as unfinished:
        assert not unfinished
    assert {path.name for path in tmp_path.iterdir()} == {"run.json", "manifest.json"}


# ---- wherever it dies


def run_to(out: Path, end: str) -> None:
    """A run that fails before it gets anywhere, or is finished and cleans up."""
    with pytest.raises(Failure), rundir.claim(One(), out, "manifest.json", resume=False):
        for name in ("best-00000000.safetensors", "tensorboard/events", "checkpoints/.partial-step-00000002/x"):
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            (out / name).write_text("x")
        if end == "finished":
            for name in ("checkpoints/step-00000002/complete.json", "best-00000002.safetensors", "manifest.json"):
                (out / name).parent.mkdir(parents=True, exist_ok=True)
                (out / name).write_text("{}")
            rundir.clear_scratch(out)
        raise Failure


@pytest.mark.parametrize("end", ["failed", "finished"])
def test_wherever_a_run_dies_in_claim_or_clean_up_it_is_resumed_and_nothing_stays_for_good(
    end: str, tmp_path: Path
) -> None:
    number, outcomes = 1, []
    while killed_at(number, out := tmp_path / str(number), lambda out=out: run_to(out, end)):
        with rundir.claim(One(), out, "manifest.json", resume=True) as unfinished:
            outcomes.append(unfinished)
            (out / "manifest.json").write_text("{}")
            rundir.clear_scratch(out)
        left = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()} - {"tensorboard/events"}
        assert left == {"run.json", "manifest.json"}, number
        shutil.rmtree(out)
        number += 1
    assert number > 15, "so few file operations make no claim"
    assert set(outcomes) == ({True, False} if end == "finished" else {True})


def test_a_directory_that_stops_taking_files_is_refused_in_one_line(tmp_path: Path, monkeypatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(rundir, "write_json", full)
    with (
        pytest.raises(
            InputError, match=r"^out: .*/out cannot be used \(No space left on device\), expected a directory"
        ),
        rundir.claim(One(), tmp_path / "out", "manifest.json", resume=False),
    ):
        pass
    assert not list(tmp_path.iterdir())


def test_a_result_that_is_whole_is_no_failure_where_scratch_cannot_be_removed(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "best-00000002.safetensors").write_text("x")

    def read_only(*_: Any, **__: Any) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "unlink", read_only)
    rundir.clear_scratch(tmp_path)


def test_settings_that_came_after_a_run_was_started_have_their_defaults(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"one": {}}')
    with rundir.claim(Two(), tmp_path, "manifest.json", resume=True) as unfinished:
        assert unfinished
    with pytest.raises(InputError, match=r"^one: "), rundir.claim(Two(one=One(x=2)), tmp_path, "manifest.json", True):
        pass
