"""Verbs that list what a registry has: name, settings and origin of each."""

from __future__ import annotations

import argparse
import inspect
from importlib import import_module
from typing import Any

from recyclable.commands.parts.command import Command, add_json, end, tell


class ListCommand(Command):
    """A list of one room's things.

    Args:
        key: what the list is called in the JSON.
        registry: the attribute of the module `room` that has them.
        verb: the verb whose run config each is a part of, all of which is listed; None: each is a whole one.
    """

    def __init__(self, key: str, text: str, place: int, room: str, registry: str, verb: str | None = None) -> None:
        self.text, self.place = text, place
        self._key, self._room, self._registry, self._verb = key, room, registry, verb

    def arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("names", nargs="*", metavar="NAME", help="these alone, with their settings explained")
        add_json(parser)

    def run(self, arguments: argparse.Namespace) -> int:
        registry = getattr(import_module(self._room), self._registry)
        listed = []
        for name in arguments.names or registry.names():
            of = registry.get(name, f"recyclable {self._key}")
            if self._verb is not None:
                of = getattr(import_module(f"recyclable.recipes.{self._verb}_settings"), f"{self._verb}_settings")(name)
            about = (inspect.getdoc(of) or "").partition("\n")[0]
            listed.append({"name": name, "from": registry.origin(name), "about": about, "settings": of.explained()})
        for one in listed:
            tell(f"{one['name']:16}{one['about']}  (from {one['from']})")
            if arguments.names:
                for setting in one["settings"]:
                    tell(f"  {_line(setting)}")
            else:
                tell(f"{'':16}{', '.join(setting['name'] for setting in one['settings'])}")
        end(arguments, {self._key: listed})
        return 0


def _line(setting: dict[str, Any]) -> str:
    default = "" if setting["required"] else f" = {setting['default']}"
    text = " ".join(setting["about"].split())
    return f"{setting['name']}: {setting['type']}{default}" + (f"    {text}" if text else "")
