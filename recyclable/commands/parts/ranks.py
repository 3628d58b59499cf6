"""Verbs that run on ranks: in this process, or through the deepspeed launcher, which starts `launch/VERB.py`."""

from __future__ import annotations

import argparse
import sys
from abc import abstractmethod
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

from recyclable.commands.parts.command import Command, command
from recyclable.commands.parts.status import one_of_ranks, parse
from recyclable.errors import InputError
from recyclable.launching import guard, preemption
from recyclable.launching.command import LAUNCHERS
from recyclable.launching.mpi import describe_rank


class RanksCommand(Command):
    """A verb whose work is shared out to ranks."""

    verb: str
    resumes: bool = False
    """Whether it can be asked to end and gone on with."""

    def add_ranks(self, parser: argparse.ArgumentParser) -> None:
        """`--nproc` and `--hostfile`; a rank that the launcher has started takes no notice of them."""
        parser.add_argument("--nproc", type=int, metavar="N", help="local ranks (default 1), or per host of a hostfile")
        parser.add_argument("--hostfile", metavar="F", help="hosts and slots of a cluster, for the deepspeed launcher")
        text = "what reaches the hosts of --hostfile: pdsh (default) or openmpi"
        parser.add_argument("--launcher", choices=list(LAUNCHERS), help=text)

    @abstractmethod
    def check(self, arguments: argparse.Namespace) -> None:
        """InputError for what can be seen to be wrong before any rank is started."""

    @abstractmethod
    def work(self, arguments: argparse.Namespace) -> None:
        """What one rank does."""

    def run(self, arguments: argparse.Namespace) -> int:
        with preemption.heeded() if self.resumes else nullcontext():
            self.check(arguments)
            given = vars(arguments)
            fits = partial(self.fits, arguments) if given.get("elastic") else None
            how = {name: given[name] for name in ("nproc", "hostfile", "launcher")}
            how |= {"restarts": given.get("max_restarts", 0), "fits": fits, "resumes": self.resumes}
            return start(self.verb, arguments.argv[1:], **how)

    def fits(self, arguments: argparse.Namespace, ranks: int) -> bool:
        """Whether the work comes out on so many ranks."""
        return True


def start(
    verb: str,
    argv: list[str],
    nproc: int | None,
    hostfile: str | None = None,
    launcher: str | None = None,
    restarts: int = 0,
    fits: Callable[[int], bool] | None = None,
    resumes: bool = False,
) -> int:
    """Run a verb with these arguments in this process, or on several ranks; returns the exit status.

    Args:
        restarts: so often it is begun again after a failure, for which it needs a process of its own.
        fits, resumes: as in `launching.supervisor.launch`.
    """
    if nproc is not None and nproc < 1:
        raise InputError("--nproc", f"found {nproc}, expected at least 1")
    if launcher is not None and hostfile is None:
        raise InputError("--launcher", "says what reaches other hosts, expected --hostfile beside it")
    if restarts < 0:
        raise InputError("--max-restarts", f"found {restarts}, expected 0 or more")
    if fits is not None and not restarts:
        raise InputError("--elastic", "says how to start again, expected --max-restarts beside it")
    if nproc in (None, 1) and hostfile is None and not restarts:
        return rank_main(verb, argv)
    from recyclable.launching.supervisor import launch
    from recyclable.resources import launch_script

    how: dict[str, Any] = {"restarts": restarts, "fits": fits, "resumes": resumes}
    return launch(launch_script(verb), argv, nproc=nproc, hostfile=hostfile, launcher=launcher or "pdsh", **how)


def rank_main(verb: str, argv: list[str] | None = None) -> int:
    """One rank of a verb, as the launcher starts it (`launch/VERB.py`); returns the exit status."""
    parser = argparse.ArgumentParser(prog=f"launch/{verb}.py")
    one = command(verb)
    assert isinstance(one, RanksCommand)
    one.arguments(parser)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the launcher adds it
    arguments = parse(parser, sys.argv[1:] if argv is None else argv)

    def work() -> None:
        describe_rank()
        guard.begin(every=True)
        one.work(arguments)

    with preemption.heeded() if one.resumes else nullcontext():  # before there is a guardian, which may signal
        return one_of_ranks(work)
