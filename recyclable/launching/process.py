"""What the system says of another process: whether it runs, is stopped or is gone, and how it ended (Linux)."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

_ZOMBIE_S = 0.3  # between a process's death and its parent's noticing, which takes the tale of it away


@dataclass(frozen=True)
class State:
    """Of a process that is there."""

    letter: str
    """As in `ps`: T where it is stopped, Z where it is dead."""
    parent: int
    exit_code: int
    """As `wait` has it, of a dead one: its status times 256, or the signal."""


def state_of(pid: int) -> State | None:
    """A process as it is now; None where there is none, or the system does not tell."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        return State(fields[0], int(fields[1]), int(fields[49]))
    except (OSError, IndexError, ValueError):
        return None


def is_stopped(pid: int) -> bool:
    """Whether somebody stopped it; a debugger's hold is none."""
    state = state_of(pid)
    return state is not None and state.letter == "T"


def end_of(pid: int) -> tuple[int | None, int | None]:
    """(signal, None) or (None, status) of a process that has just ended; (None, None) where nobody knows any more."""
    end = time.monotonic() + _ZOMBIE_S
    while (state := state_of(pid)) is not None and time.monotonic() < end:
        if state.letter in "ZX":
            number = state.exit_code & 0x7F
            return (number, None) if number else (None, state.exit_code >> 8)
        time.sleep(0.005)
    return None, None


def command_of(pid: int) -> str:
    """Its command line; empty where there is none."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace").replace("\0", " ")
    except OSError:
        return ""


def exit_handle(pid: int) -> int | None:
    """A file that can be read once a process has ended; None where the system has no such thing."""
    try:
        return os.pidfd_open(pid)
    except (AttributeError, OSError):
        return None
