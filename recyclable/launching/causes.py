"""Why a run ends, in one line: which rank, on which host, what happened to it, and what can be done."""

from __future__ import annotations

import re
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from recyclable.errors import printable

DONE, FAILED, BAD_INPUT, PREEMPTED = 0, 1, 2, 75
"""Exit statuses; 75 is sysexits' EX_TEMPFAIL, by which schedulers know what may be begun again."""
# What ranks say that miss another one, in the words of gloo, NCCL, torch's store and `distributed`.
_MISSES_ANOTHER = re.compile(
    r"connection (was )?(closed|reset|refused|aborted)|broken pipe|socket timeout|timed out|nccl|gloo"
    r"|DistNetworkError|DistStoreError|rank \d+ failed:|heard no more of it",
    re.IGNORECASE,
)
_OFTEN_OF_ANOTHER = (signal.SIGABRT, signal.SIGTERM)  # NCCL's watchdog; deepspeed's launcher when one rank has ended


@dataclass(frozen=True)
class Where:
    """A rank, as messages name it."""

    rank: int
    host: str
    step: int | None = None
    """The last one that it has done, as far as it has told."""


@dataclass(frozen=True)
class Cause:
    """Something that ends a run."""

    where: Where | None
    """None: no rank in particular."""
    what: str
    status: int = FAILED
    traceback: str = ""
    whole: bool = False
    """Whether `what` is all that is to be said."""
    second: bool = False
    """Whether it may be but what another rank's end did to this one."""
    unreliable: bool = False
    """Whether the rank had better be done without: it was killed, stopped or lost."""

    @property
    def lasting(self) -> bool:
        """Whether the same would come again."""
        return self.whole and not self.second

    def line(self, checkpoint: int | None = None) -> str:
        """What is said of it.

        Args:
            checkpoint: step of the last one that is known to be whole.
        """
        told = self.what
        if self.where is not None:
            named = f"rank {self.where.rank} on {self.where.host}"
            if self.whole:
                return told if self.status != FAILED or named in told else f"{told} ({named})"
            told = f"{named} {told}"
            if self.where.step is not None:
                told += f" after step {self.where.step}" if self.where.step else " before its first step"
        if checkpoint is not None and not self.whole:
            told += f"; checkpoint of step {checkpoint} is whole: go on with --resume"
        return told


@dataclass(frozen=True)
class Ending:
    """How a run ended."""

    status: int
    line: str = ""
    traceback: str = ""
    lasting: bool = False
    """Whether it would come to the same again: a rank of its own accord told why, in a line for people."""


def tell(ending: Ending) -> None:
    """Tell a person, on standard error; where nobody can be told any more, nothing."""
    label = "" if ending.status == PREEMPTED else "error: "
    with suppress(OSError, ValueError):
        # one write: others write there as well
        sys.stderr.write(printable(f"{ending.traceback}recyclable: {label}{ending.line}\n"))
        sys.stderr.flush()


def died(where: Where, number: int | None, status: int | None, asked: int | None = None) -> Cause:
    """Of a rank that ended without a word.

    Args:
        number: of the signal that ended it.
        status: what it exited with; None besides a signal: nobody knows.
        asked: the signal by which ranks were asked to end, if they were.
    """
    if number is not None:
        name = signal.Signals(number).name if number in set(signal.Signals) else "unknown"
        if number == asked:
            return Cause(None, f"ended by {name}")
        hint = ", as the system does when memory runs out" if number == signal.SIGKILL else ""
        second = number in _OFTEN_OF_ANOTHER
        return Cause(where, f"was killed (signal {number}, {name}{hint})", second=second, unreliable=not second)
    if status is None:
        return Cause(where, "ended, nobody saw how", second=True)
    return Cause(where, f"ended with status {status}", status if status in (BAD_INPUT, PREEMPTED) else FAILED)


def said(where: Where, status: int, line: str, traceback: str) -> Cause:
    """Of a rank that told why it ends: an error of its own with a traceback, or a line for people."""
    if traceback:
        return Cause(where, f"failed: {line}", FAILED, traceback, second=bool(_MISSES_ANOTHER.search(line)))
    return Cause(where, line, status, whole=True, second=bool(_MISSES_ANOTHER.search(line)))


def stopped(where: Where, seconds: float) -> Cause:
    """Of a rank that somebody stopped."""
    return Cause(where, f"does not run (SIGSTOP or the like, for {seconds:.0f} s)", unreliable=True)


def lost(where: Where, problem: str | None) -> Cause:
    """Of a rank that nothing is heard of any more: its guardian went without a word, or the network."""
    reason = f"no sign of its host: {problem}" if problem else "its host or its guardian was ended"
    return Cause(where, f"is lost ({reason})", unreliable=True)


def orphaned(where: Where) -> Cause:
    """Of a rank whose launcher is gone."""
    return Cause(where, "lost deepspeed's launcher (it was killed)")


def first(causes: Sequence[Cause]) -> Cause:
    """The one that the others follow from."""
    return next((cause for cause in causes if not cause.second), causes[0])
