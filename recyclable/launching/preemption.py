"""Signals that ask a process to end: heeded at once, or held until a step is done and its checkpoint is written."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from recyclable.errors import Preempted

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
_asked: str | None = None
_held = False


@contextmanager
def heeded() -> Iterator[None]:
    """While it lasts, such a signal raises Preempted, once, or is held; in the main thread alone, else nothing changes.

    A second Ctrl-C raises it whatever is held.
    """
    global _asked, _held
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _asked, _held = None, False
    # what whoever started this process has it ignore stays so, as under nohup; but for what only schedulers send
    numbers = [n for n in _SIGNALS if signal.getsignal(n) != signal.SIG_IGN or n == signal.SIGUSR1]
    before = {number: signal.signal(number, _note) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _asked, _held = None, False


def hold() -> None:
    """Signals wait from now on until somebody looks at `asked`."""
    global _held
    _held = True


def let_go() -> None:
    """Signals are heeded at once again; one that came meanwhile stays `asked`."""
    global _held
    _held = False


@contextmanager
def unheard() -> Iterator[None]:
    """Processes and threads that are begun while it lasts never hear of such signals; this thread does afterwards."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def asked() -> str | None:
    """Name of the signal that asked this process to end, if one did."""
    return _asked


def preempted(step: int) -> Preempted:
    """What is raised once the checkpoint of a step is whole."""
    by = f" by {_asked}" if _asked else ""  # another rank's signal has none here
    return Preempted(f"ended{by} after step {step}, whose checkpoint is written: go on with --resume")


def _note(number: int, _: FrameType | None) -> None:
    global _asked
    name = signal.Signals(number).name
    again, _asked = _asked, name
    insists = number == signal.SIGINT and again == name
    if insists or not (_held or again):  # one that has been heeded must not disturb what it began
        raise Preempted(f"ended at once by {name}: go on with --resume")
