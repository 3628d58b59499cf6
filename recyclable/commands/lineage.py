"""`recyclable lineage`: where a base comes from, and bases that were upgraded elsewhere."""

from __future__ import annotations

import argparse

from recyclable.commands.parts.command import Command, Group, add_json, end, tell


class Show(Command):
    """The chain, nearest first."""

    text = "a base's fingerprint and ancestors"

    def arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("base", metavar="B")
        add_json(parser)

    def run(self, arguments: argparse.Namespace) -> int:
        from recyclable.recipes.lineage import show
        from recyclable.weights.lineage import other_template

        shown = show(arguments.base)
        line = [{"name": arguments.base, "fingerprint": shown["fingerprint"]}, *shown["ancestors"]]
        for ancestor, child in zip(line, [line[0], *line], strict=False):
            claim = "  (declared by the user to be the parent)" if ancestor.get("declared") else ""
            other = other_template(child["fingerprint"], ancestor["fingerprint"])
            template = f"  (had another chat template than {child['name']})" if other else ""
            tell(f"{ancestor['fingerprint']['weights'][:12]}  {ancestor['name']}{claim}{template}")
        end(arguments, shown)
        return 0


class Declare(Command):
    """The user's claim."""

    text = "record that a base was upgraded from another outside recyclable"

    def arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("base", metavar="B")
        parser.add_argument("--parent", required=True, metavar="A")

    def run(self, arguments: argparse.Namespace) -> int:
        from recyclable.recipes.lineage import declare
        from recyclable.weights.lineage import other_template

        record = declare(arguments.base, arguments.parent)
        tell(f"{arguments.base}: recorded {arguments.parent} as its parent, as your claim")
        if other_template(record["fingerprint"], record["ancestors"][0]["fingerprint"]):
            tell(f"notice: {arguments.base} has another chat template than {arguments.parent}; it is recorded")
        return 0


TEXT = "where a base comes from, and bases that were upgraded elsewhere"
COMMAND = Group(TEXT, 90, {"show": Show(), "declare": Declare()})
