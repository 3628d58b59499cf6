"""`recyclable probe`: is it worth recycling? A verdict and its evidence, without training."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING

from recyclable.commands.parts.command import add_json, add_store, end, tell
from recyclable.commands.parts.ranks import RanksCommand

if TYPE_CHECKING:
    from recyclable.recipes.probe_settings import ProbeSettings


class Probe(RanksCommand):
    """On one process, or on ranks that share the points."""

    verb = "probe"
    text = "is it worth recycling? a verdict and its evidence, without training"
    place = 70

    def arguments(self, parser: argparse.ArgumentParser) -> None:
        add = parser.add_argument
        add("--weights", required=True, metavar="W", help="outdated weights: a directory, or a name")
        add_store(parser)
        add("--base", required=True, metavar="B", help="the new base")
        add("--old-base", metavar="A", help="their own base, where manifest and lineage lead nowhere")
        add("--task", metavar="T", help="try them on its dev set; without it only weights are looked at")
        add("--examples", type=int, metavar="N", help="of dev (default 300)")
        add("--points", type=int, metavar="N", help="of the path from old to new model (default 11)")
        add("--to", metavar="W2", help="weights tuned on the new base: the path leads to them")
        text = "the new base need be no descendant of theirs"
        add("--allow-unrelated", action="store_true", default=None, help=text)
        add("--out", metavar="DIR", help="where a page, TensorBoard files and probe.json go")
        add("--resume", action="store_true", help="go on with the probe in --out")
        add_json(parser)
        self.add_ranks(parser)

    def check(self, arguments: argparse.Namespace) -> None:
        self._settings(arguments)

    def work(self, arguments: argparse.Namespace) -> None:
        from recyclable import distributed
        from recyclable.recipes.probe import probe
        from recyclable.recipes.same_inputs import require_same_inputs
        from recyclable.report.probe_page import summary

        if "RANK" in os.environ:  # else one process does it all, without a process group
            distributed.init()
        settings = self._settings(arguments)
        require_same_inputs(settings)
        result, verdict = probe(settings, arguments.resume)
        if distributed.is_main():
            tell(summary(result, verdict.reason))
            end(arguments, result)

    def _settings(self, arguments: argparse.Namespace) -> ProbeSettings:
        from recyclable.config.run_file import make_config
        from recyclable.recipes.probe_settings import ProbeSettings

        given = {name: getattr(arguments, name) for name in ProbeSettings.model_fields}
        return make_config(ProbeSettings, {name: v for name, v in given.items() if v is not None}, "probe")


COMMAND = Probe()
