"""What a run is started again after, on what, and how it can be asked to end while it has no ranks. Starts nothing."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from typing import Any

import pytest

from recyclable.errors import InputError, Preempted
from recyclable.launching import supervisor
from recyclable.launching.attempt import Attempt
from recyclable.launching.causes import BAD_INPUT, DONE, FAILED, PREEMPTED
from recyclable.launching.checking import check
from recyclable.launching.supervisor import launch

LOST = Attempt(FAILED, culprits={0}, lost=True, asked=False)
FELL = Attempt(FAILED, culprits=set(), lost=False, asked=False)
LASTING = Attempt(FAILED, culprits=set(), lost=False, asked=False, lasting=True)
AWAY = InputError("hosts", "node-2: cannot be used over ssh")


@pytest.fixture
def attempts(monkeypatch):
    """Lets `launch` come to these ends, one after the other; gives what it passed on each time."""
    monkeypatch.setattr(supervisor, "SILENCE_S", 0)

    def come_to(ends: Sequence[Attempt | InputError]) -> list[dict[str, Any]]:
        left, seen = list(ends), []

        def attempt(script: str, args: list[str], **how: Any) -> Attempt:
            seen.append({"resumed": "--resume" in args, **how})
            end = left.pop(0)
            if isinstance(end, InputError):
                raise end
            return end

        monkeypatch.setattr(supervisor, "attempt", attempt)
        return seen

    return come_to


@pytest.mark.parametrize(
    ("ends", "status", "tries"),
    [
        ([FELL, Attempt(DONE, set(), False, False)], 0, 2),
        ([LOST, AWAY, Attempt(DONE, set(), False, False)], 0, 3),
        ([LOST, AWAY, AWAY, AWAY], 1, 4),
        ([FELL, FELL, FELL, FELL], 1, 4),
        ([LASTING], 1, 1),
        ([FELL, LASTING], 1, 2),
        ([FELL, Attempt(BAD_INPUT, set(), False, False, True)], 2, 2),
        ([Attempt(PREEMPTED, set(), False, True, True)], 75, 1),
        ([Attempt(FAILED, set(), False, True)], 1, 1),
    ],
)
def test_failures_are_tried_again_but_for_what_would_come_again(attempts, ends, status, tries):
    seen = attempts(ends)
    assert launch("script.py", [], nproc=2, restarts=3) == status
    assert [(one["resumed"], one["again"]) for one in seen] == [(number > 0, number > 0) for number in range(tries)]


def test_hosts_that_cannot_be_used_are_bad_input_where_nothing_has_run_yet(attempts):
    seen = attempts([AWAY])
    with pytest.raises(InputError, match="node-2"):
        launch("script.py", [], nproc=2, restarts=3)
    assert len(seen) == 1


def test_what_is_told_of_a_host_that_is_away_when_a_run_is_started_again(attempts, capsys):
    attempts([FELL, AWAY])
    assert launch("script.py", [], nproc=2, restarts=1) == 1
    *_, last = capsys.readouterr().err.splitlines()
    assert last == "recyclable: error: hosts: node-2: cannot be used over ssh"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_what_can_be_gone_on_with_can_be_asked_to_end_while_hosts_are_looked_at(monkeypatch, number):
    def attempt(*_: Any, **__: Any) -> Attempt:
        os.kill(os.getpid(), number)
        return FELL

    before = signal.getsignal(number)
    monkeypatch.setattr(supervisor, "attempt", attempt)
    with pytest.raises(Preempted, match=rf"^ended at once by {number.name}: go on with --resume$"):
        launch("script.py", [], nproc=2, restarts=3, resumes=True)
    assert signal.getsignal(number) == before


def test_and_while_it_waits_to_start_again(monkeypatch, attempts):
    seen = attempts([LOST])
    monkeypatch.setattr(supervisor.time, "sleep", lambda _: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Preempted, match="SIGTERM"):
        launch("script.py", [], nproc=2, restarts=3, resumes=True)
    assert len(seen) == 1


class OneHost:
    """Another host, which answers what it is asked."""

    def __init__(self) -> None:
        self.names = self.answering = ["192.0.2.7"]
        self.silent: dict[str, str] = {}

    def skews(self) -> dict[str, float]:
        return {"192.0.2.7": 0.0}

    def ask(self, name: str, **_: Any) -> dict[str, Any]:
        return self.ask_each(name, lambda _: {})

    def ask_each(self, name: str, _: Any) -> dict[str, Any]:
        report = {"chosen_interfaces": {}, "interfaces": {}}
        return {"192.0.2.7": {"own_address": "192.0.2.7", "listen": 29123, "reach": [None], "report": report}.get(name)}


def test_one_other_host_alone_has_an_address_and_a_port_too(monkeypatch):
    monkeypatch.setattr("recyclable.launching.checking.compare", lambda *_: [])
    found = check(OneHost(), {"192.0.2.7": 2})  # type: ignore[arg-type]
    assert (found.address, found.port, found.findings) == ("192.0.2.7", 29123, [])
