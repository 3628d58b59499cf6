"""Scalars for people to watch are no reason to end a run: where they cannot be written any more it goes on without."""

from __future__ import annotations

import math
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

from recyclable import distributed

_Event = tuple[str, float, int]
_hook = threading.excepthook


def outlive(monitor: Any) -> None:
    """Have a monitor of DeepSpeed leave out what is no finite number, and end, told, when the disk fails it.

    TensorBoard writes in a thread, which dies of a full disk with a traceback; whoever writes next is told why.
    """
    write = monitor.write_events

    def written(events: list[_Event], *more: Any, **options: Any) -> None:
        try:
            write([event for event in events if math.isfinite(event[1])], *more, **options)
        except OSError as error:
            monitor.enabled = False
            monitor.write_events = lambda *_, **__: None
            distributed.say(f"notice: scalars cannot be written any more ({error.strerror or error})")

    monitor.write_events = written
    threading.excepthook = _thread_died


class RunScalars:
    """Scalars of a run that no engine of DeepSpeed writes for, in TensorBoard's files; as `outlive` has a monitor."""

    enabled = True

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: Any = None
        outlive(self)

    def write_events(self, events: list[_Event]) -> None:
        """Write (name, value, step) of each."""
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter  # no other run needs it at its start

            self._writer = SummaryWriter(str(self._folder))
        for event in events:
            self._writer.add_scalar(*event)

    def close(self) -> None:
        """No more is written."""
        if self._writer is not None:
            with suppress(OSError):
                self._writer.close()


def _thread_died(arguments: threading.ExceptHookArgs) -> None:
    if not (isinstance(arguments.exc_value, OSError) and "AsyncWriter" in type(arguments.thread).__name__):
        _hook(arguments)
