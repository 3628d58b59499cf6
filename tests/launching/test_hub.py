"""Guardians and their hub: how a run ends is found out, told in one line, and no rank outlives it. No torch here."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from types import SimpleNamespace

import psutil
import pytest
from processes import ROOT, SUPPORT

from recyclable.host import free_port
from recyclable.launching import hub as hubs
from recyclable.launching.causes import Ending, Where, died, first, said
from recyclable.launching.hub import Hub
from recyclable.launching.watch import HERE, VARIABLE, Watch
from recyclable.launching.wire import SILENCE_S, line

TIMEOUT_S = 60
HOST = socket.gethostname()
AFTER = f"rank 1 on {HOST} {{}} after step 3"
ENDINGS = {
    "done": (0, ""),
    "silent": (0, ""),
    "killed": (1, AFTER.format("was killed (signal 9, SIGKILL, as the system does when memory runs out)")),
    "crashed": (1, AFTER.format("was killed (signal 11, SIGSEGV)")),
    "left": (1, AFTER.format("ended with status 3")),
    "bad": (2, "task.yaml: is wrong"),
    "raised": (1, AFTER.format("failed: ValueError: no")),
    "consequence": (1, AFTER.format("was killed (signal 9, SIGKILL, as the system does when memory runs out)")),
    "checkpoint": (
        1,
        AFTER.format("was killed (signal 9, SIGKILL, as the system does when memory runs out)")
        + "; checkpoint of step 2 is whole: go on with --resume",
    ),
    "unguarded": (1, AFTER.format("is lost (its host or its guardian was ended)")),
    "stubborn": (1, AFTER.format("was killed (signal 9, SIGKILL, as the system does when memory runs out)")),
    "stopped": (1, AFTER.format("does not run (SIGSTOP or the like, for 10 s)")),
    "asked": (75, "ended at once by SIGUSR1: go on with --resume"),
    "interrupted": (1, "ended at once"),
}
"""Case -> how it ends: the status, and the line that a person is told."""


def begin(case: str, rank: int, world: int = 2, **environment: object) -> subprocess.Popen:
    """A rank, in an environment as a launcher would give it."""
    given = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "PYTHONPATH": ROOT, **environment}
    command = [sys.executable, "-S", str(SUPPORT / "guarded_ranks.py"), case]
    return subprocess.Popen(
        command,
        env={**os.environ, **{name: str(value) for name, value in given.items()}},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@dataclass
class Case:
    """Two ranks and their hub."""

    name: str
    hub: Hub
    ranks: list[subprocess.Popen] = field(default_factory=list)
    told: list[Ending] = field(default_factory=list)
    out: list[tuple[str, str]] = field(default_factory=list)


@pytest.fixture(scope="module")
def out_of_reach() -> tuple[subprocess.Popen, int]:
    """A rank that looks for its hub in vain, and where; it takes its time."""
    port = free_port()
    return begin("waits", 0, 1, **{VARIABLE: Watch((HERE,), port, "")}), port


@pytest.fixture(scope="module")
def cases(out_of_reach) -> dict[str, Case]:
    """All of them at once, in one loop, each until it is over."""
    found = {}
    with selectors.DefaultSelector() as selector:
        for name in ENDINGS:
            told: list[Ending] = []
            hub = Hub(selector, token="secret", say=told.append)
            watch = Watch((HERE,), hub.port, "secret")
            found[name] = Case(name, hub, [begin(name, rank, **{VARIABLE: watch}) for rank in range(2)], told)
        deadline, asked = time.monotonic() + TIMEOUT_S, False
        while not all(case.hub.over for case in found.values()):
            assert time.monotonic() < deadline, [name for name, case in found.items() if not case.hub.over]
            for key, _ in selector.select(0.1):
                key.data()
            if not asked and found["asked"].hub.heard_of_all and found["interrupted"].hub.heard_of_all:
                found["asked"].hub.preempt(signal.SIGUSR1)
                found["interrupted"].hub.interrupt()
                asked = True
            for case in found.values():
                case.hub.tick()
        for case in found.values():
            case.hub.__exit__(None, None, None)
            case.out = [rank.communicate(timeout=TIMEOUT_S) for rank in case.ranks]
    return found


@pytest.mark.parametrize("name", ENDINGS)
def test_a_run_ends_with_one_line_that_names_rank_host_and_cause_and_leaves_nothing(cases, name):
    case, (status, line) = cases[name], ENDINGS[name]
    assert case.hub.ending is not None and (case.hub.ending.status, case.hub.ending.line) == (status, line)
    assert case.told == ([] if status == 0 else [case.hub.ending])
    assert [err for _, err in case.out] == ["", ""]  # of two lines one would be wrong
    assert not any(psutil.pid_exists(int(out.split()[0])) for out, _ in case.out)
    assert left_guardians([int(out.split()[0]) for out, _ in case.out]) == []


def left_guardians(ranks: list[int]) -> list[int]:
    """Guardians of these ranks that are still there after a moment."""
    end = time.monotonic() + 10
    while True:
        found = []
        for process in psutil.process_iter(["cmdline"]):
            command = process.info["cmdline"] or []
            if "recyclable.launching.guardian" in command and int(command[-1]) in ranks:
                found.append(process.pid)
        if not found or time.monotonic() > end:
            return found
        time.sleep(0.1)


@pytest.mark.parametrize(("name", "culprits"), [("killed", {1}), ("raised", set()), ("unguarded", {1})])
def test_ranks_that_ended_because_of_another_are_no_culprits(cases, name, culprits):
    assert cases[name].hub.culprits() == culprits


def test_the_traceback_is_that_of_the_cause(cases):
    assert cases["raised"].told[0].traceback == "Traceback\nValueError: no\n"
    assert cases["consequence"].told[0].traceback == ""


def test_only_who_knows_the_token_is_a_rank():
    with selectors.DefaultSelector() as selector, Hub(selector, token="secret") as hub:
        hello = b'{"hello": "%s", "rank": 0, "world": 1, "host": "x"}\n'
        sent = [hello % b"", hello % b"Secret", b"\xff\n", b"[" * 99999 + b"\n", b"{}\n", b'{"hello": "secret"}\n']
        strangers = [socket.create_connection((HERE, hub.port)) for _ in sent]
        for stranger, data in zip(strangers, sent, strict=True):
            stranger.sendall(data)
        end = time.monotonic() + 0.5
        while time.monotonic() < end:
            for key, _ in selector.select(0.1):
                key.data()
            hub.tick()
        assert not hub.heard_of_all and hub.ending is None
        for stranger in strangers:
            stranger.close()


def test_a_rank_that_does_not_begin_is_missed(monkeypatch):
    monkeypatch.setattr(hubs, "_BEGIN_S", 0.0)
    told: list[Ending] = []
    with selectors.DefaultSelector() as selector, Hub(selector, say=told.append) as hub:
        rank = begin("asked", 0, **{VARIABLE: Watch((HERE,), hub.port, "")})
        while not hub.over:
            for key, _ in selector.select(0.1):
                key.data()
            hub.tick()
    rank.communicate(timeout=TIMEOUT_S)
    assert told[0].line == "rank 1 did not begin within 0 s of the others"


def lonely(case: str, port: int) -> list[tuple[int, str]]:
    """(status, standard error) of two ranks that no command watches over."""
    ranks = [begin(case, rank, MASTER_ADDR=HERE, MASTER_PORT=port) for rank in range(2)]
    errors = [rank.communicate(timeout=TIMEOUT_S)[1] for rank in ranks]
    return [(rank.returncode, error) for rank, error in zip(ranks, errors, strict=True)]


def port_before_a_free_one() -> int:
    """A free port whose successor, where the hub will be, is free as well."""
    while True:
        port = free_port()
        with contextlib.suppress(OSError), socket.socket() as listener:
            listener.bind(("127.0.0.1", port + 1))
            return port


def test_without_a_command_rank_0_has_the_hub():
    (_, told), (status, silent) = lonely("killed", port_before_a_free_one())
    assert told == f"recyclable: error: {ENDINGS['killed'][1]}\n"
    assert (status, silent) == (-signal.SIGKILL, "")


def test_without_a_command_a_port_that_is_taken_is_told_and_the_run_goes_on():
    with socket.create_server((HERE, 0)) as other:
        (first_status, told), (second_status, silent) = lonely("done", other.getsockname()[1] - 1)
    assert (first_status, second_status, silent) == (0, 0, "")
    assert told.startswith("recyclable: notice: port ") and told.count("\n") == 1


def test_without_a_command_a_rank_that_was_asked_to_end_keeps_its_status_where_rank_0_is_gone_before():
    _, (status, silent) = lonely("outlives", port_before_a_free_one())
    assert (status, silent) == (75, "")


def test_without_a_command_no_guardian_is_left_where_none_reaches_rank_0():
    rank = begin("silent", 0, MASTER_ADDR="nowhere.invalid", MASTER_PORT=free_port())
    out, _ = rank.communicate(timeout=TIMEOUT_S)
    assert left_guardians([int(out)]) == []


def test_ranks_end_with_the_hub():
    selector = selectors.DefaultSelector()
    with Hub(selector) as hub:
        rank = begin("waits", 0, 1, **{VARIABLE: Watch((HERE,), hub.port, "")})
        while not hub.heard_of_all:
            for key, _ in selector.select(0.1):
                key.data()
    out, err = rank.communicate(timeout=TIMEOUT_S)
    assert rank.returncode == -signal.SIGKILL
    assert err.startswith(f"recyclable: error: rank 0 on {HOST} lost the command that started it (")
    assert left_guardians([int(out)]) == []


def test_a_hub_that_is_out_of_reach_is_named(out_of_reach):
    rank, port = out_of_reach
    _, err = rank.communicate(timeout=TIMEOUT_S)
    assert rank.returncode == -signal.SIGKILL
    assert f"cannot reach the command that started it at {HERE}:{port} (" in err


def test_the_cause_is_what_others_follow_from():
    where, other = Where(0, "a", 7), Where(1, "b", 0)
    lost = said(where, 1, "RuntimeError: Connection reset by peer", "Traceback")
    aborted = died(where, signal.SIGABRT, None)
    killed = died(other, signal.SIGKILL, None)
    assert first([lost, aborted, killed]) is killed
    assert first([lost, aborted]) is lost
    assert killed.line(4).startswith("rank 1 on b was killed (signal 9, SIGKILL")
    assert killed.line(4).endswith("before its first step; checkpoint of step 4 is whole: go on with --resume")
    assert said(where, 1, "out: disk full", "").line() == "out: disk full (rank 0 on a)"
    assert died(where, 15, None, asked=15).line() == "ended by SIGTERM"


class Guardians:
    """Made up, of ranks on these hosts; their hub's clock stands still but when it is told to go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, hosts: list[str]) -> None:
        self.now, self.told = 0.0, []
        monkeypatch.setattr(hubs, "time", SimpleNamespace(monotonic=lambda: self.now))
        self._selector = selectors.DefaultSelector()
        self.hub = Hub(self._selector, say=self.told.append)
        self.sides = [socket.create_connection((HERE, self.hub.port)) for _ in hosts]
        for rank, (side, host) in enumerate(zip(self.sides, hosts, strict=True)):
            side.sendall(line({"hello": "", "rank": rank, "world": len(hosts), "host": host}))
        while not self.hub.heard_of_all:
            self.pass_by(0)

    def pass_by(self, seconds: float) -> None:
        self.now += seconds
        while found := self._selector.select(0.2):
            for key, _ in found:
                key.data()
        self.hub.tick()

    def close(self) -> None:
        self.hub.__exit__(None, None, None)
        for side in self.sides:
            side.close()
        self._selector.close()


@pytest.fixture
def guardians(monkeypatch):
    made: list[Guardians] = []
    yield lambda hosts: made.append(Guardians(monkeypatch, hosts)) or made[-1]
    for each in made:
        each.close()


SECOND = {"word": {"status": 1, "line": "DistBackendError: NCCL error: remote process exited", "traceback": "Tr"}}


def test_what_the_loss_of_a_host_does_to_others_waits_for_the_host_to_be_missed(guardians):
    two = guardians(["a", "b"])
    two.sides[0].sendall(line(SECOND))
    two.pass_by(0)
    two.pass_by(SILENCE_S)
    assert two.hub.ending is None
    two.sides[1].close()
    two.pass_by(0)
    two.pass_by(0.6)
    assert [ending.line.partition(" (")[0] for ending in two.told] == ["rank 1 on b is lost"]


@pytest.mark.parametrize(("hosts", "most"), [(["a", "a"], 6), (["a", "b"], 20)])
def test_where_nothing_else_is_found_it_is_the_cause_in_time(guardians, hosts, most):
    two = guardians(hosts)
    two.sides[0].sendall(line(SECOND))
    two.pass_by(0)
    two.pass_by(most)
    assert [ending.line for ending in two.told] == [
        "rank 0 on a failed: DistBackendError: NCCL error: remote process exited"
    ]
    assert not two.told[0].lasting


@pytest.mark.parametrize(("text", "lasting"), [("step 3: the loss is nan", True), ("timed out", False)])
def test_what_a_rank_tells_in_a_line_would_come_again_unless_it_misses_another(guardians, text, lasting):
    one = guardians(["a"])
    one.sides[0].sendall(line({"word": {"status": 1, "line": text, "traceback": ""}}))
    one.pass_by(0)
    one.pass_by(30)
    assert (one.told[0].line, one.told[0].lasting) == (f"{text} (rank 0 on a)", lasting)


@pytest.mark.parametrize(("resumes", "status"), [(True, 75), (False, 1)])
def test_what_is_asked_to_end_before_any_rank_has_begun_ends_as_its_verb_does(resumes, status):
    told: list[Ending] = []
    with selectors.DefaultSelector() as selector, Hub(selector, say=told.append) as hub:
        hub.preempt(signal.SIGTERM, resumes)
        assert hub.over and told == [Ending(status, "ended before any rank had begun")]
