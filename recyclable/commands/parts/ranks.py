"""Verbs that run on ranks: in this process, or through the deepspeed launcher, which starts `launch/VERB.py`."""

from __future__ import annotations

import argparse
import sys
from abc import abstractmethod

from recyclable.commands.parts.command import Command, command
from recyclable.commands.parts.status import one_of_ranks, parse
from recyclable.errors import InputError


class RanksCommand(Command):
    """A verb whose work is shared out to ranks."""

    verb: str

    def add_ranks(self, parser: argparse.ArgumentParser) -> None:
        """`--nproc` and `--hostfile`; a rank that the launcher has started takes no notice of them."""
        parser.add_argument("--nproc", type=int, metavar="N", help="local ranks (default 1), or per host of a hostfile")
        parser.add_argument("--hostfile", metavar="F", help="hosts and slots of a cluster, for the deepspeed launcher")
        text = "what reaches other hosts: pdsh (default) or openmpi"
        parser.add_argument("--launcher", metavar="L", default="pdsh", help=text)

    @abstractmethod
    def check(self, arguments: argparse.Namespace) -> None:
        """InputError for what can be seen to be wrong before any rank is started."""

    @abstractmethod
    def work(self, arguments: argparse.Namespace) -> None:
        """What one rank does."""

    def run(self, arguments: argparse.Namespace) -> int:
        self.check(arguments)
        return start(self.verb, arguments.argv[1:], arguments.nproc, arguments.hostfile, arguments.launcher)


def start(verb: str, argv: list[str], nproc: int | None, hostfile: str | None = None, launcher: str = "pdsh") -> int:
    """Run a verb with these arguments in this process, or on several ranks; returns the exit status."""
    if nproc is not None and nproc < 1:
        raise InputError("--nproc", f"found {nproc}, expected at least 1")
    if nproc in (None, 1) and hostfile is None:
        return rank_main(verb, argv)
    from recyclable.launching.supervisor import launch
    from recyclable.resources import launch_script

    return launch(launch_script(verb), argv, nproc=nproc, hostfile=hostfile, launcher=launcher)


def rank_main(verb: str, argv: list[str] | None = None) -> int:
    """One rank of a verb, as the launcher starts it (`launch/VERB.py`); returns the exit status."""
    parser = argparse.ArgumentParser(prog=f"launch/{verb}.py")
    one = command(verb)
    assert isinstance(one, RanksCommand)
    one.arguments(parser)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the launcher adds it
    arguments = parse(parser, sys.argv[1:] if argv is None else argv)
    return one_of_ranks(lambda: one.work(arguments))
