"""Lines on standard output: for a person, whose absence ends no run, or a verb's result, which has to arrive."""

from __future__ import annotations

import os
import sys
from contextlib import suppress

from recyclable.errors import RunError, printable


def say(text: str) -> None:
    """Print lines for a person: given up where nobody takes them, as behind a terminal or a pipe that is gone."""
    try:
        print(printable(text), flush=True)
    except (OSError, ValueError):  # ValueError: it is closed
        _let_go()


def give(text: str) -> None:
    """Print a part of a verb's result; RunError where it cannot be written."""
    try:
        print(text, flush=True)
    except OSError as error:
        _let_go()
        raise RunError("standard output", f"cannot be written to ({error.strerror})") from error


def _let_go() -> None:
    """Have what waits to be written go nowhere, else Python ends with a status of its own; what follows is tried."""
    with suppress(OSError, ValueError), open(os.devnull, "wb") as nowhere:  # there may be none that can be let go of
        own = sys.stdout.fileno()
        before = os.dup(own)
        try:
            os.dup2(nowhere.fileno(), own)
            sys.stdout.flush()
        finally:
            os.dup2(before, own)
            os.close(before)
