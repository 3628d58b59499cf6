"""The `recyclable` command: parses and dispatches, nothing else."""

from __future__ import annotations

import argparse
import sys

import recyclable
from recyclable.commands.parts.command import commands
from recyclable.commands.parts.status import guarded, parse
from recyclable.host import use_cpu_if_alone


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status, of which README.md tells."""
    return guarded(lambda: _run(sys.argv[1:] if argv is None else argv))


def _run(argv: list[str]) -> int:
    arguments = parse(parser(), argv)
    arguments.argv = argv
    use_cpu_if_alone()
    return arguments.run(arguments)


def parser() -> argparse.ArgumentParser:
    """What the command line understands: every verb of `recyclable.commands`."""
    whole = argparse.ArgumentParser(prog="recyclable", description=recyclable.__doc__)
    verbs = whole.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, command in commands().items():
        command.add_to(verbs, name)
    return whole


if __name__ == "__main__":
    sys.exit(main())
