"""`recyclable evaluate`: score adapted weights; several are compared."""

from __future__ import annotations

import argparse
from pathlib import Path

from recyclable.commands.parts.command import Command, add_json, add_store, end


class Evaluate(Command):
    """A row per weights."""

    text = "score adapted weights; several are compared"
    place = 50

    def arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--weights", required=True, nargs="+", metavar="W", help="adapted weights: directories, or names"
        )
        add_store(parser)
        text = "the model they go on: their own base or a descendant"
        parser.add_argument("--base", required=True, metavar="B", help=text)
        parser.add_argument("--task", required=True, metavar="T", help="task directory or file")
        parser.add_argument("--old-base", metavar="A", help="their own base, if the recorded names lead nowhere")
        parser.add_argument("--split", default="test")
        parser.add_argument("--plot", type=Path, metavar="PNG", help="save the dev curves of the runs")
        add_json(parser)

    def run(self, arguments: argparse.Namespace) -> int:
        from recyclable.recipes.evaluate import evaluate_all
        from recyclable.report.compare import plot, require_plottable, table
        from recyclable.weights.manifest import read_manifest
        from recyclable.weights.store import find

        if arguments.plot:
            require_plottable(arguments.plot, "--plot")
        folders = [find(weights, arguments.store) for weights in arguments.weights]
        rows = evaluate_all(
            folders,
            arguments.base,
            arguments.task,
            old_base=arguments.old_base,
            split=arguments.split,
        )
        print(table(rows), flush=True)
        if arguments.plot:
            curves = {str(folder): [vars(read_manifest(folder))] for folder in folders}
            plot({f"dev of {Path(arguments.task).name}": curves}, arguments.plot)
        end(arguments, {"runs": rows})
        return 0


COMMAND = Evaluate()
