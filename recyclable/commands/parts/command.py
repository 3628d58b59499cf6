"""What every verb is: a line of help, its arguments, and what it does; found by its module's name."""

from __future__ import annotations

import argparse
import json
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Mapping
from importlib import import_module
from typing import Any

import recyclable.commands
from recyclable.errors import printable
from recyclable.output import give


class Command(ABC):
    """One verb; each module of `recyclable.commands` has an instance, `COMMAND`."""

    text: str
    """What it does, in a line."""
    place: int = 100
    """Where it stands in the list of verbs, the lowest first."""

    @abstractmethod
    def arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add the verb's arguments."""

    @abstractmethod
    def run(self, arguments: argparse.Namespace) -> int:
        """Do it; returns the exit status. Raises InputError."""

    def add_to(self, verbs: argparse._SubParsersAction[argparse.ArgumentParser], name: str) -> None:
        """Add the verb to a parser's."""
        parser = verbs.add_parser(name, help=self.text, description=self.text)
        self.arguments(parser)
        parser.set_defaults(run=self.run)


class Group(Command):
    """A verb with verbs of its own."""

    def __init__(self, text: str, place: int, inner: Mapping[str, Command]) -> None:
        self.text, self.place, self._inner = text, place, inner

    def arguments(self, parser: argparse.ArgumentParser) -> None:
        verbs = parser.add_subparsers(required=True, metavar="VERB")
        for name, command in self._inner.items():
            command.add_to(verbs, name)

    def run(self, arguments: argparse.Namespace) -> int:
        raise NotImplementedError("one of its verbs is run")


def command(verb: str) -> Command:
    """The command of a verb."""
    return import_module(f"recyclable.commands.{verb}").COMMAND


def commands() -> dict[str, Command]:
    """All verbs, in the order in which they are listed."""
    names = (module.name for module in pkgutil.iter_modules(recyclable.commands.__path__) if not module.ispkg)
    found = {name: command(name) for name in names}
    return dict(sorted(found.items(), key=lambda item: (item[1].place, item[0])))


def add_json(parser: argparse.ArgumentParser) -> None:
    """`--json`, for every verb that prints a table."""
    parser.add_argument("--json", action="store_true", help="end with one JSON object")


def add_store(parser: argparse.ArgumentParser) -> None:
    """`--store`, for every verb that takes adapted weights."""
    parser.add_argument("--store", metavar="S", help="the store's directory (default: RECYCLABLE_STORE or ./store)")


def tell(text: str) -> None:
    """Print lines for a person, who asked for them."""
    give(printable(text))


def end(arguments: argparse.Namespace, result: Any) -> None:
    """The last line: one JSON object, if it was asked for."""
    if arguments.json:
        give(json.dumps(result, default=str))
