"""On a rank: begins its guardian, and tells it how far the rank is and how it ends."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

from recyclable.launching.watch import VARIABLE
from recyclable.launching.wire import line

_ROOT = Path(__file__).parents[2]
_RANK = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
_MOST_TOLD = 20_000  # characters of a traceback
_guardian: tuple[socket.socket, subprocess.Popen[bytes]] | None = None


def begin(every: bool = False) -> None:
    """Have this rank guarded: it ends with the run, and the run with it. Once is enough.

    Args:
        every: also where no command of recyclable has started it, but something else has started several.
    """
    global _guardian
    one_of_several = os.environ.keys() >= _RANK and os.environ["WORLD_SIZE"] != "1"
    if _guardian is not None or not (VARIABLE in os.environ or (every and one_of_several)):
        return
    own, theirs = socket.socketpair()
    # -S: nothing but the standard library and this package is wanted, so no installed package's start-up code
    command = [sys.executable, "-S", "-m", "recyclable.launching.guardian", str(os.getpid())]
    environment = {**os.environ, "PYTHONPATH": str(_ROOT), "PYTHONSAFEPATH": "1"}
    with theirs:
        process = subprocess.Popen(
            command, env=environment, stdin=theirs.fileno(), stdout=subprocess.DEVNULL, start_new_session=True
        )
    os.environ.pop(VARIABLE, None)  # no process that this one starts is a rank
    _guardian = own, process
    if not own.recv(1 << 10):  # a line: it is there, and the command's hub knows of this rank
        os._exit(1)
    threading.Thread(target=_end_with_guardian, args=(own,), daemon=True).start()


def tell(**told: int) -> None:
    """Tell how far the rank is: `step`, the last one done, or `checkpoint`, the step of one that is whole."""
    if _guardian is not None:
        with suppress(OSError):  # its own loss: nobody waits for a guardian
            _guardian[0].send(line(told), socket.MSG_DONTWAIT)


def last_word(status: int, text: str = "", traceback: str = "") -> bool:
    """Tell how the rank is about to end; whether there is somebody to say so to a person.

    Args:
        text: in a line, why.
        traceback: where it is an error of the program.
    """
    if _guardian is None:
        return False
    word = {"status": status, "line": text, "traceback": traceback[-_MOST_TOLD:]}
    try:
        _guardian[0].sendall(line({"word": word}))
    except OSError:
        return False
    return True


def leave() -> None:
    """In a process that was forked from a rank: it is none, and holds nothing that the guardian listens to."""
    global _guardian
    if _guardian is not None:
        _guardian[0].close()
        _guardian = None


def _end_with_guardian(own: socket.socket) -> None:
    """The guardian says no more, so what there is to read is its end: nobody would end this rank any more."""
    with suppress(OSError):
        own.recv(1)
    os._exit(1)
