"""Starts a script on every rank, and starts it again where ranks were lost and that is wanted."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

from recyclable.errors import InputError
from recyclable.launching import preemption
from recyclable.launching.attempt import Attempt, attempt
from recyclable.launching.causes import FAILED
from recyclable.launching.hostfile import read_hostfile, write_hostfile
from recyclable.launching.wire import SILENCE_S

Fits = Callable[[int], bool]
"""Whether a run comes out on so many ranks."""
_RESUME = "--resume"


def launch(
    script: str | Path,
    args: list[str],
    *,
    nproc: int | None = None,
    hostfile: str | Path | None = None,
    master_port: int | None = None,
    launcher: str = "pdsh",
    restarts: int = 0,
    fits: Fits | None = None,
    resumes: bool = False,
) -> int:
    """Run `script args` on every rank and wait; ranks share this process's stdout and stderr.

    SIGTERM, SIGUSR1, Ctrl-C and a closed terminal ask ranks to end, a second Ctrl-C ends them at once. Where they do
    not all succeed, a line on standard error says why.

    Args:
        nproc: ranks per host; None: the hostfile's slots, or one.
        hostfile: hosts and slots as deepspeed reads them; None: this host alone.
        master_port: None takes a free one, of the first host.
        launcher: what reaches other hosts, of `command.LAUNCHERS`.
        restarts: so often the script is started again, with `--resume`, after it failed, but for what ranks told of
            their own accord in a line (a bad step, a full disk), which would come again. Then hosts that cannot be
            used are a failure as well, and may come back.
        fits: it is then started without the ranks that were killed, stopped or lost, on the largest number that this
            takes; None: on as many as before.
        resumes: whether the script can be gone on with where it is asked to end before any rank has begun.

    Returns 0 when all ranks succeeded, 2 of bad input, 75 when a rank was asked to end and can be gone on with, else 1.
    Raises InputError for an unusable hostfile or number of ranks, and Preempted, of what `resumes`, when it is asked to
    end while there are no ranks.
    """
    hosts = {"": nproc or 1} if hostfile is None else read_hostfile(hostfile)
    hosts = {host: nproc or slots for host, slots in hosts.items()}
    how: dict[str, Any] = {"master_port": master_port, "launcher": launcher, "resumes": resumes}
    with (
        tempfile.TemporaryDirectory(prefix="recyclable-") as scratch,
        preemption.heeded() if resumes else nullcontext(),
    ):
        for number in range(restarts + 1):
            try:
                ended = attempt(script, args, nproc=nproc, hostfile=hostfile, again=number > 0, **how)
            except InputError as error:
                if number == 0:
                    raise
                _say(f"error: {error}")
                ended = Attempt(FAILED, culprits=set(), lost=True, asked=False)
            if ended.status != FAILED or ended.asked or ended.lasting or number == restarts:
                break
            if fits is not None:
                hosts = remaining(hosts, ended.culprits, fits)
                if not hosts:
                    _say("error: the batch comes out whole on no number of the ranks that are left")
                    break
                if hostfile is None:
                    nproc = hosts[""]
                else:
                    nproc, hostfile = None, write_hostfile(Path(scratch) / "hostfile", hosts)
            _say(f"restart {number + 1} of {restarts}: on {sum(hosts.values())} ranks, with {_RESUME}")
            args = [*args, *([] if _RESUME in args else [_RESUME])]
            if ended.lost:
                time.sleep(SILENCE_S)  # until those out of reach have ended as well
    return ended.status


def remaining(hosts: Mapping[str, int], culprits: Collection[int], fits: Fits) -> dict[str, int]:
    """Host -> ranks without those that were the cause, as many of them as fit; empty where none do.

    Where all were, all are taken again.

    Args:
        hosts: host -> ranks, in the order of their numbers.
    """
    left: dict[str, int] = {}
    begin = 0
    for host, slots in hosts.items():
        left[host] = slots - sum(begin <= rank < begin + slots for rank in culprits)
        begin += slots
    left = left if any(left.values()) else dict(hosts)
    most = sum(left.values())
    count = next((number for number in range(most, 0, -1) if fits(number)), 0)
    taken: dict[str, int] = {}
    for host, slots in left.items():
        taken[host] = min(slots, count - sum(taken.values()))
    return {host: slots for host, slots in taken.items() if slots}


def _say(text: str) -> None:
    with suppress(OSError, ValueError):  # nobody can be told
        print(f"recyclable: {text}", file=sys.stderr, flush=True)
