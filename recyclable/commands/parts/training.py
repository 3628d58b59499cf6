"""The verbs that take a run config: read, check, run the recipe of the verb's name."""

from __future__ import annotations

import argparse
import json
from importlib import import_module
from typing import Any

from recyclable.commands.parts.command import add_json, end
from recyclable.commands.parts.ranks import RanksCommand
from recyclable.errors import InputError

_SETTINGS = {
    "pretrain": "its settings; `recyclable lms NAME` explains them",
    "tune": "its settings; `recyclable tunings NAME` explains them",
    "recycle": "its settings; `recyclable methods NAME` explains them",
}


class TrainingCommand(RanksCommand):
    """`recyclable VERB run.yaml [key=value ...]`: `recipes.VERB_settings` reads the file, `recipes.VERB` runs it."""

    resumes = True

    def __init__(self, verb: str, text: str, place: int) -> None:
        self.verb, self.text, self.place = verb, text, place

    def arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("config", metavar="run.yaml", help=_SETTINGS.get(self.verb))
        parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings over the file's")
        add_deepspeed_config(parser)
        parser.add_argument("--out", metavar="DIR", help="over the file's `out`")
        parser.add_argument("--resume", action="store_true", help="go on from the newest whole checkpoint")
        text = "start again so often, from the newest whole checkpoint, where a rank fails or is lost (default 0)"
        parser.add_argument("--max-restarts", type=int, default=0, metavar="N", help=text)
        text = "start again without the ranks that were lost, on the largest number that the batch comes out on"
        parser.add_argument("--elastic", action="store_true", help=text)
        text = "profile so many steps (torch's profiler): traces and a table of their phases in DIR/profile"
        parser.add_argument("--profile", type=int, default=0, metavar="N", help=text)
        add_json(parser)
        self.add_ranks(parser)

    def check(self, arguments: argparse.Namespace) -> None:
        if arguments.profile < 0:
            raise InputError("--profile", f"found {arguments.profile}, expected a number of steps")
        self._read(arguments)

    def work(self, arguments: argparse.Namespace) -> None:
        from recyclable import distributed
        from recyclable.recipes.running import run_recipe
        from recyclable.training.profiling import STEPS

        STEPS.set(arguments.profile)
        settings, ds_config = self._read(arguments)
        distributed.init()
        named = {"run": arguments.config, "where": _ds_config(arguments)}
        result = run_recipe(self.verb, settings, ds_config, arguments.resume, **named)
        if distributed.is_main():
            distributed.say(f"{self.verb}: done, see {settings.out}")
            end(arguments, result)

    def fits(self, arguments: argparse.Namespace, ranks: int) -> bool:
        from recyclable.recipes.running import require_batches  # takes seconds to import

        settings, ds_config = self._read(arguments)
        try:
            require_batches(self.verb, settings, ds_config, ranks, run=arguments.config, where=_ds_config(arguments))
        except InputError:
            return False
        return True

    def _read(self, arguments: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
        """The run config and the ds_config that the arguments name."""
        from recyclable import machine
        from recyclable.config.run_file import read_run_file

        out = [f"out={json.dumps(arguments.out)}"] if arguments.out else []
        content = read_run_file(arguments.config, [*arguments.overrides, *out])
        read = getattr(import_module(f"recyclable.recipes.{self.verb}_settings"), f"read_{self.verb}_settings")
        return read(content, arguments.config), machine.load_ds_config(_ds_config(arguments))


def add_deepspeed_config(parser: argparse.ArgumentParser, default: str = "cpu") -> None:
    """`--deepspeed_config`.

    Args:
        default: what is used without it, in a few words.
    """
    text = f"a file, or the name of a shipped one (default: {default})"
    parser.add_argument("--deepspeed_config", metavar="F", help=text)


def _ds_config(arguments: argparse.Namespace) -> str:
    from recyclable.resources import default_ds_config

    return arguments.deepspeed_config or str(default_ds_config())
