"""`recyclable quickstart`: the whole story on this machine: real text, a few minutes on 2 CPU cores."""

from __future__ import annotations

import argparse
from pathlib import Path

from recyclable.commands.parts.command import Command, add_json, end
from recyclable.commands.parts.ranks import start
from recyclable.commands.parts.training import add_deepspeed_config


class Quickstart(Command):
    """A study that is written, run and shown."""

    text = "the whole story on this machine: real text, a few minutes on 2 CPU cores"
    place = 0

    def arguments(self, parser: argparse.ArgumentParser) -> None:
        add = parser.add_argument
        add("--base", metavar="B", help="start from this base instead of a small one made here")
        add("--corpus", metavar="C", help="upgrade on this text instead of documentation strings")
        add("--task", metavar="T", help="this task instead of telling libraries from their documentation")
        add("--out", type=Path, default=Path("quickstart"), metavar="DIR")
        add("--nproc", type=int, default=2, metavar="N", help="local ranks (default 2)")
        add_deepspeed_config(parser)
        add_json(parser)

    def run(self, arguments: argparse.Namespace) -> int:
        from recyclable.recipes.quickstart import quickstart

        chosen = ["--deepspeed_config", arguments.deepspeed_config] if arguments.deepspeed_config else []

        def run_study(file: Path) -> int:
            return start("study", [str(file), *chosen], arguments.nproc)

        result = quickstart(arguments.out, arguments.base, arguments.corpus, arguments.task, run_study)
        if result is None:
            return 1
        end(arguments, result)
        return 0


COMMAND = Quickstart()
