"""`recyclable evaluate`: score adapted weights, or a base alone; several are compared."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from recyclable.commands.parts.command import add_json, add_store, end, tell
from recyclable.commands.parts.ranks import RanksCommand
from recyclable.commands.parts.training import add_deepspeed_config
from recyclable.errors import InputError


class Evaluate(RanksCommand):
    """A row per weights; examples are shared out to the ranks."""

    verb = "evaluate"
    text = "score adapted weights, or a base alone; several are compared"
    place = 50

    def arguments(self, parser: argparse.ArgumentParser) -> None:
        text = "adapted weights: directories, or names; none: the base alone, on a task whose answers are text"
        parser.add_argument("--weights", nargs="+", default=[], metavar="W", help=text)
        add_store(parser)
        text = "the model they go on: their own base or a descendant"
        parser.add_argument("--base", required=True, metavar="B", help=text)
        parser.add_argument("--task", required=True, metavar="T", help="task directory or file")
        parser.add_argument("--old-base", metavar="A", help="their own base, if the recorded names lead nowhere")
        parser.add_argument("--split", default="test")
        text = "text whose loss is told too, by weights of a task whose answers are text: files, or names of data sets"
        parser.add_argument("--corpus", nargs="+", default=[], metavar="C", help=text)
        text = "tokens per sequence of it, of which 256 are told (default 128)"
        parser.add_argument("--corpus-length", type=int, default=128, metavar="N", help=text)
        parser.add_argument("--plot", type=Path, metavar="PNG", help="save the dev curves of the runs")
        add_deepspeed_config(parser, "fp32, whole on each rank")
        add_json(parser)
        self.add_ranks(parser)

    def check(self, arguments: argparse.Namespace) -> None:
        from recyclable.report.compare import require_plottable

        if arguments.plot:
            if not arguments.weights:
                raise InputError("--plot", "draws the dev curves of --weights, and there are none")
            require_plottable(arguments.plot, "--plot")

    def work(self, arguments: argparse.Namespace) -> None:
        from recyclable import distributed
        from recyclable.machine import load_ds_config
        from recyclable.recipes.evaluate import evaluate_all
        from recyclable.recipes.same_inputs import require_same_inputs
        from recyclable.report.compare import plot, table
        from recyclable.weights.manifest import read_manifest
        from recyclable.weights.store import find

        ds_config = load_ds_config(arguments.deepspeed_config) if arguments.deepspeed_config else {}
        if "RANK" in os.environ or ds_config:  # else one process does it all, without a process group
            distributed.init()
        folders = [find(weights, arguments.store) for weights in arguments.weights]
        read = {"weights": folders, "old_base": arguments.old_base, "base": arguments.base, "task": arguments.task}
        require_same_inputs(read)
        rows = evaluate_all(
            folders,
            arguments.base,
            arguments.task,
            old_base=arguments.old_base,
            split=arguments.split,
            ds_config=ds_config,
            corpus=arguments.corpus,
            corpus_length=arguments.corpus_length,
        )
        if not distributed.is_main():
            return
        tell(table(rows))
        if arguments.plot:
            curves = {str(folder): [vars(read_manifest(folder))] for folder in folders}
            plot({f"dev of {Path(arguments.task).name}": curves}, arguments.plot)
        end(arguments, {"runs": rows})


COMMAND = Evaluate()
