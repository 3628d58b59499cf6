"""`--profile N`: steps of a run under torch's profiler, as traces to look at and a table of where the time went."""

from __future__ import annotations

import errno
import heapq
import json
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import profile, record_function

from recyclable import distributed
from recyclable.ranges import BACKWARD, DATA, EVALUATION, FORWARD, LOSS, OPTIMIZER, SAVING
from recyclable.weights.durable import write_json

STEPS: ContextVar[int] = ContextVar("steps that are profiled", default=0)
"""What the command was asked for; 0: no profile."""
FOLDER, TABLE = "profile", "table.json"
COMMUNICATION, OTHER = "communication", "other"
PHASES = (DATA, FORWARD, LOSS, BACKWARD, OPTIMIZER, COMMUNICATION, OTHER)
_BETWEEN = (EVALUATION, SAVING)
_WARM_UP = 3
_PROFILED = "profiled steps"
_ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
_OF_HOST = ("gloo:", "mpi:", "ucc:")
"""How torch's own annotations of collectives on the host begin; on a GPU they are kernels, `nccl...`."""


class Span(NamedTuple):
    """Some time that something is to be told of."""

    begin: float
    end: float
    phase: str
    level: int = 0
    """Of several at once the highest tells, among equals the last that has begun."""


class Profile:
    """Of a run that is about to go on.

    Args:
        first: the step it is at, from 0.
        end: its number of steps.
    """

    def __init__(self, out: Path, label: str, first: int, end: int) -> None:
        left, wanted = end - first, STEPS.get()
        warm_up = min(_WARM_UP, max(left - wanted, min(1, left - 1)))
        self._folder, self._label = out / FOLDER, label
        self._begin, self._end = first + warm_up, min(end, first + warm_up + wanted)
        self._at = first
        self._now: profile | None = None
        self._window = record_function(_PROFILED)

    def at(self, step: int) -> None:
        """A step (from 0) is about to begin: begin the profile, or end it, where it is time to; a collective."""
        self._at = step
        if step == self._begin < self._end:
            self._start()
        elif step == self._end:
            self.end(step)

    @property
    def steps(self) -> int:
        """How many are done, once the last one that `at` was told of is."""
        return self._at + 1

    def _start(self) -> None:
        _finish_queued()
        self._now = profile()
        self._now.start()
        self._window.__enter__()

    def stop(self) -> profile | None:
        """No more is profiled; what has been, if anything."""
        found, self._now = self._now, None
        if found is not None:
            _finish_queued()
            self._window.__exit__(None, None, None)
            found.stop()
        return found

    def end(self, step: int) -> None:
        """Write, and tell, what has been profiled so far, if anything; a collective.

        Args:
            step: how many steps are done.
        """
        if (found := self.stop()) is None:
            return
        path = self._folder / f"rank{distributed.rank():05d}.pt.trace.json"
        events = distributed.agreed_write(partial(_written, found, path))
        if distributed.is_main():
            table = table_of(seconds_by_phase(events), self._begin, step)
            write_json(self._folder / TABLE, table)
            distributed.say("\n".join(lines(self._label, table, self._folder)))


@contextmanager
def profiling(out: Path, label: str, first: int, end: int) -> Iterator[Profile]:
    """The profile of a run that `STEPS` asks for, if it does; steps are then to be told to `Profile.at`."""
    found = Profile(out, label, first, end)
    try:
        yield found
        found.end(found.steps)
    finally:
        found.stop()  # of a run that failed nothing is told


def _written(found: profile, path: Path) -> list[dict[str, Any]]:
    """The events of a trace that is now in the file; OSError where it is not, of which torch says nothing."""
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    found.export_chrome_trace(str(path))
    try:
        return json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    except (OSError, ValueError) as error:
        raise OSError(errno.EIO, "it is not whole, as on a full disk", str(path)) from error


def seconds_by_phase(events: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Phase -> seconds of a trace's profiled steps, which add up to all of them; evaluations and checkpoints left out.

    On a CPU each moment is the phase's that the loop is in, or a collective's. Where a GPU computes it is that of the
    kernel which runs there, by when it was launched: a collective's only where no other runs beside it, the batches'
    where none runs and the loop waits for them.

    Args:
        events: those of a Chrome trace, in microseconds.
    """
    whole = [event for event in events if event.get("ph") == "X"]
    window = next(event for event in whole if event["name"] == _PROFILED and event["cat"] == "user_annotation")
    spans = [_span(window, OTHER, -1)]
    host = [_span(e, e["name"]) for e in whole if e["cat"] == "user_annotation" and e["name"] in (*PHASES, *_BETWEEN)]
    if device := [event for event in whole if event["cat"] in _ON_DEVICE]:
        launched = {_correlation(e): e["ts"] for e in whole if e["cat"] in ("cuda_runtime", "cuda_driver")}
        pieces = list(pieces_of(host))
        begins = [piece.begin for piece in pieces]
        for event in device:
            at = launched.get(_correlation(event), event["ts"])
            piece = pieces[max(0, bisect_right(begins, at) - 1)] if pieces else spans[0]
            phase = piece.phase if piece.begin <= at < piece.end else OTHER
            collective = "nccl" in event["name"].lower()
            spans.append(_span(event, COMMUNICATION, 1) if collective else _span(event, phase, 2))
        spans += [span for span in host if span.phase in (DATA, *_BETWEEN)]
    else:
        spans += host
        spans += [_span(e, COMMUNICATION, 1) for e in whole if e["name"].startswith(_OF_HOST)]
    found = dict.fromkeys(PHASES, 0.0)
    for piece in pieces_of(spans):
        begin, end = max(piece.begin, spans[0].begin), min(piece.end, spans[0].end)
        if piece.phase in found and begin < end:
            found[piece.phase] += (end - begin) / 1e6
    return found


def pieces_of(spans: Iterable[Span]) -> Iterator[Span]:
    """All the time that any span covers, in order, each piece as the span has it that tells there."""
    ordered, active, place = sorted(spans), list[tuple[float, ...]](), 0
    for begin, end in pairwise(sorted({bound for span in ordered for bound in span[:2]})):
        while place < len(ordered) and ordered[place].begin <= begin:
            span = ordered[place]
            heapq.heappush(active, (-span.level, -span.begin, span.end, place))
            place += 1
        while active and active[0][2] <= begin:
            heapq.heappop(active)
        if active:
            yield Span(begin, end, ordered[int(active[0][3])].phase)


def table_of(seconds: Mapping[str, float], first: int, end: int) -> dict[str, Any]:
    """The steps, from 1; seconds of one of them, and each phase's, with its share."""
    total, steps = sum(seconds.values()), end - first
    phases = {name: {"seconds": value / steps, "share": value / total} for name, value in seconds.items()}
    return {"steps": [first + 1, end], "seconds": total / steps, "phases": phases}


def lines(label: str, table: Mapping[str, Any], folder: Path) -> Iterator[str]:
    """The table for a person."""
    first, last = table["steps"]
    yield f"{label}: profile of steps {first} to {last}, {table['seconds']:.4f} s each; traces are in {folder}"
    for name, found in table["phases"].items():
        yield f"  {name:<14}{found['seconds']:>10.4f} s{found['share']:>8.1%}"


def _span(event: Mapping[str, Any], phase: str, level: int = 0) -> Span:
    return Span(event["ts"], event["ts"] + event["dur"], phase, level)


def _correlation(event: Mapping[str, Any]) -> int | None:
    return event.get("args", {}).get("correlation")


def _finish_queued() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
