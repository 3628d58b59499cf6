"""From arguments to an exit status: 0 done, 1 failed while running, 2 bad input, 75 asked to end; told in one line."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable

from recyclable.errors import InputError, Preempted
from recyclable.launching import guard
from recyclable.launching.causes import DONE, FAILED, Ending, tell
from recyclable.weights.durable import disk_failures


def parse(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """Parse, with key=value settings wherever they stand; argparse alone wants them right behind run.yaml."""
    arguments, rest = parser.parse_known_args(argv)
    settings = [argument for argument in rest if not argument.startswith("-")]
    if len(settings) < len(rest) or (settings and not hasattr(arguments, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if settings:
        arguments.overrides = [*arguments.overrides, *settings]
    return arguments


def guarded(work: Callable[[], int | None]) -> int:
    """What `work` returns (None: 0), or the error's status after one line on standard error."""
    try:
        return _readable(work) or DONE
    except (InputError, Preempted) as error:
        tell(Ending(error.exit_status, str(error)))
        return error.exit_status
    except KeyboardInterrupt:
        tell(Ending(FAILED, "ended at once by SIGINT"))
        return FAILED


def one_of_ranks(work: Callable[[], int | None]) -> int:
    """As `guarded`, on one of several ranks, whose process group is left at the end.

    Where a guardian watches over it, that is told instead of a person: of what happened to all ranks one is the cause.
    """
    try:
        status = _readable(work) or DONE
    except (InputError, Preempted) as error:
        status = error.exit_status
        if not guard.last_word(status, str(error)):
            tell(Ending(status, str(error)))
    except Exception as error:
        told = "".join(traceback.format_exception(error))
        if not guard.last_word(FAILED, " ".join(f"{type(error).__name__}: {error}".split()), told):
            raise
        if os.environ.get("RECYCLABLE_VERBOSE"):
            traceback.print_exc()  # of every rank
        status = FAILED
    finally:
        if (distributed := sys.modules.get("recyclable.distributed")) is not None:  # else there is no group to leave
            distributed.shutdown()
    if status == DONE:
        guard.last_word(DONE)
    return status


def _readable(work: Callable[[], int | None]) -> int | None:
    """What `work` returns; InputError for a file that this user has no permission for, RunError where a disk fails."""
    try:
        with disk_failures("a disk"):
            return work()
    except PermissionError as error:
        if error.filename is None:
            raise
        raise InputError(error.filename, f"cannot be used ({error.strerror}), expected permission for it") from error
