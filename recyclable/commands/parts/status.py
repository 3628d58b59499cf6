"""From arguments to an exit status: 0 done, 1 failed while running, 2 bad input, told in one line."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable

from recyclable.errors import InputError

_PATIENCE_S = 30  # how long other ranks let rank 0 speak; then they have found something that it has not


def parse(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """Parse, with key=value settings wherever they stand; argparse alone wants them right behind run.yaml."""
    arguments, rest = parser.parse_known_args(argv)
    settings = [argument for argument in rest if not argument.startswith("-")]
    if len(settings) < len(rest) or (settings and not hasattr(arguments, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if settings:
        arguments.overrides = [*arguments.overrides, *settings]
    return arguments


def guarded(work: Callable[[], int | None], speaks: bool = True) -> int:
    """What `work` returns (None: 0), or the error's status after one line on standard error."""
    try:
        return work() or 0
    except InputError as error:
        if not speaks:
            # The launcher ends all ranks with the first that ends, so rank 0, which found the same, speaks before that.
            time.sleep(_PATIENCE_S)
        print(f"recyclable: error: {error}", file=sys.stderr, flush=True)
        return error.exit_status


def one_of_ranks(work: Callable[[], int | None]) -> int:
    """As `guarded`, on one of several ranks, whose process group is left at the end."""
    from recyclable import distributed

    try:
        return guarded(work, speaks=os.environ.get("RANK", "0") == "0")
    finally:
        distributed.shutdown()
