"""Ranks start through the deepspeed launcher, work together, hand their status on, and end with the command."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from processes import ROOT, SUPPORT

from recyclable.errors import InputError
from recyclable.launching.command import launcher_environment
from recyclable.launching.supervisor import launch, remaining

HOST = socket.gethostname()
RANKS = SUPPORT / "ranks.py"
COMMAND = (
    "import sys; from recyclable.launching.supervisor import launch; "
    "sys.exit(launch({script!r}, sys.argv[1:], nproc=2))"
)
TIMEOUT_S = 120  # on a busy machine; a launch takes about 8 s
LAUNCHES = {
    "SIGTERM": ["wait"],
    "SIGKILL": ["wait"],
    "hello": ["hello"],
    "die": ["die"],
    "launcher": ["wait"],
    "runner": ["wait"],
    "asleep": ["asleep"],
    "together": ["together", "two words"],
}


def start(*args: str, cwd: Path) -> subprocess.Popen:
    environment = {
        name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    }
    environment.pop("RECYCLABLE_VERBOSE", None)
    environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, "-c", COMMAND.format(script=str(RANKS)), *args]
    return subprocess.Popen(
        command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    """All launches of this file at once: most of a launch is waiting. Name -> (process, working directory)."""
    started = {}
    for name, args in LAUNCHES.items():
        cwd = tmp_path_factory.mktemp(name)
        started[name] = start(*args, cwd=cwd), cwd
    yield started
    for process, _ in started.values():
        process.kill()
        process.communicate()


def result(command: tuple[subprocess.Popen, Path]) -> tuple[int, list[str], str]:
    out, err = command[0].communicate(timeout=TIMEOUT_S)
    return command[0].returncode, sorted(out.splitlines()), err


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGKILL], ids=lambda s: s.name)
def test_ranks_end_with_the_command_however_it_ends(commands, sent):
    command, cwd = commands[sent.name]
    ranks = [int(wait_for(cwd / f"pid{rank}").read_text()) for rank in range(2)]
    assert [pid for pid in ranks if not alive(pid)] == []
    command.send_signal(sent)
    _, err = command.communicate(timeout=TIMEOUT_S)  # also waits for the ranks: they hold the other end of the pipes
    assert [pid for pid in ranks if alive(pid)] == []
    assert command.returncode == (1 if sent == signal.SIGTERM else -signal.SIGKILL)
    lost = f"rank 0 on {HOST} lost the command that started it ("
    assert err.startswith(f"recyclable: error: {'ended by SIGTERM' if sent == signal.SIGTERM else lost}")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "generation", "said"),
    [
        ("launcher", 0, rf"rank [01] on {HOST} lost deepspeed's launcher \(it was killed\)"),
        ("runner", 1, r"deepspeed's launcher ended by signal 9 \(SIGKILL\)"),
    ],
)
def test_a_killed_launcher_is_a_failure_and_leaves_no_rank(commands, name, generation, said):
    command, cwd = commands[name]
    ranks = [int(wait_for(cwd / f"pid{rank}").read_text()) for rank in range(2)]
    launcher = psutil.Process(ranks[0]).parents()[generation]
    assert f"deepspeed.launcher.{('launch', 'runner')[generation]}" in launcher.cmdline()
    launcher.kill()
    _, err = command.communicate(timeout=TIMEOUT_S)
    assert [pid for pid in ranks if alive(pid)] == []
    assert command.returncode == 1
    assert re.fullmatch(f"recyclable: error: {said}\n", err)


def test_a_rank_that_is_stopped_before_it_is_watched_over_does_not_hold_the_others(commands):
    status, _, err = result(commands["asleep"])
    assert (status, err) == (1, "recyclable: error: a rank was stopped (SIGSTOP or the like) before it had begun\n")


def test_ranks_compute_together_and_bad_input_found_by_rank_0_ends_all_with_2(commands):
    status, out, err = result(commands["together"])
    assert out == [
        "rank 0 of 2 passed ['together', 'two words']",
        "rank 0: task.yaml: is wrong",
        "rank 1 of 2 passed ['together', 'two words']",
        "rank 1: task.yaml: is wrong",
    ], err
    assert (status, len(err.splitlines())) == (2, 1)
    assert re.fullmatch(rf"recyclable: error: rank [01] on {HOST} ended with status 2\n", err)


def test_success_of_all_ranks_is_success_and_only_they_talk(commands):
    assert result(commands["hello"]) == (0, ["hello from 0", "hello from 1"], "")


def test_a_killed_rank_is_a_failure(commands):
    status, _, err = result(commands["die"])
    assert status == 1
    assert err.startswith(f"recyclable: error: rank 1 on {HOST} was killed (signal 9, SIGKILL")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("hosts", "culprits", "most", "left"),
    [
        ({"": 4}, {1}, 3, {"": 3}),
        ({"": 4}, {1}, 2, {"": 2}),
        ({"a": 2, "b": 2}, {2, 3}, 9, {"a": 2}),
        ({"a": 2, "b": 2}, {0}, 9, {"a": 1, "b": 2}),
        ({"a": 2, "b": 2}, {0}, 2, {"a": 1, "b": 1}),
        ({"a": 2, "b": 2}, set(), 9, {"a": 2, "b": 2}),
        ({"": 2}, {0, 1}, 9, {"": 2}),
        ({"": 2}, {0}, 0, {}),
    ],
)
def test_what_is_left_is_the_largest_number_of_ranks_that_fits(hosts, culprits, most, left):
    assert remaining(hosts, culprits, lambda count: count <= most) == left


def alive(pid: int) -> bool:
    """Running, and not a zombie that nobody reaps, as orphans in some containers."""
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def wait_for(path: Path) -> Path:
    deadline = time.monotonic() + TIMEOUT_S
    while not path.exists():
        assert time.monotonic() < deadline, f"{path.name} never came"
        time.sleep(0.1)
    return path


def test_ranks_share_the_cores_unless_told_otherwise(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert [launcher_environment(n, local=True)["OMP_NUM_THREADS"] for n in (None, 2, 3, 16)] == ["8", "4", "2", "1"]
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert launcher_environment(2, local=True)["OMP_NUM_THREADS"] == "5"


@pytest.mark.parametrize("text", [None, "", "# nothing\n", "node-1\n", "node-1 slots=2\nnode-2 slot=2\n"])
def test_an_unusable_hostfile_is_refused_before_anything_starts(tmp_path, text):
    path = tmp_path / "hosts"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match=r"expected lines such as `node-1 slots=8`"):
        launch(RANKS, [], hostfile=path)


def test_several_hosts_without_pdsh_are_refused(tmp_path, monkeypatch):
    (tmp_path / "hosts").write_text("node-1 slots=2\nnode-2 slots=2\n")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match="pdsh"):
        launch(RANKS, [], hostfile=tmp_path / "hosts")


def test_no_ranks_are_refused():
    with pytest.raises(InputError, match="--nproc: is 0"):
        launch(RANKS, [], nproc=0)
