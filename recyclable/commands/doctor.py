"""`recyclable doctor`: what this machine, or the hosts of a hostfile, can run, and which of them is wrong."""

from __future__ import annotations

import argparse

from recyclable.commands.parts.command import Command, add_json, end, tell
from recyclable.errors import InputError


class Doctor(Command):
    """A line per host, a line per finding."""

    text = "what this machine, or the hosts of a hostfile, can run, and which of them is wrong"
    place = 87

    def arguments(self, parser: argparse.ArgumentParser) -> None:
        text = "a run whose bases, weights, tasks and corpora every host must have alike"
        parser.add_argument("config", nargs="?", metavar="run.yaml", help=text)
        parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings over the file's")
        parser.add_argument(
            "--hostfile", metavar="F", help="hosts and slots of a cluster (default: this machine alone)"
        )
        parser.add_argument("--deepspeed_config", metavar="F", help="the run's: must be the same on every host")
        add_json(parser)

    def run(self, arguments: argparse.Namespace) -> int:
        from recyclable.recipes.doctor import doctor
        from recyclable.report.doctor_lines import lines

        found = doctor(arguments.hostfile, arguments.config, arguments.overrides, arguments.deepspeed_config)
        for line in lines(found):
            tell(line)
        end(arguments, found)
        if grave := [finding for finding in found["findings"] if finding["grave"]]:
            more = f" (and {len(grave) - 1} more, see above)" if len(grave) > 1 else ""
            raise InputError(grave[0]["host"], grave[0]["text"] + more)
        return 0


COMMAND = Doctor()
