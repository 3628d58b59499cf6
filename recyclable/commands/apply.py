"""`recyclable apply`: put outdated weights on a new base, without training."""

from __future__ import annotations

import argparse
from pathlib import Path

from recyclable.commands.parts.command import Command, add_json, add_store, end, tell


class Apply(Command):
    """A new directory for transformers or PEFT."""

    text = "put outdated weights on a new base, without training"
    place = 60

    def arguments(self, parser: argparse.ArgumentParser) -> None:
        add = parser.add_argument
        add("--weights", required=True, nargs="+", metavar="W", help="adapted weights; several are merged")
        add_store(parser)
        add("--base", required=True, metavar="B", help="the model they go on: their own base or a descendant")
        add("--out", required=True, type=Path, metavar="DIR", help="a new directory, plain transformers or PEFT")
        text = "strength of the difference (default 1); auto finds one for each layer group on --task, without training"
        add("--scale", metavar="S", help=text)
        add("--task", metavar="T", help="task directory or file for --scale auto")
        add("--examples", type=int, metavar="N", help="of its dev examples (default 128)")
        add("--ties", type=float, metavar="DENSITY", help="keep this share, the largest, of each difference")
        add("--dare", type=float, metavar="RATE", help="drop this share of each difference at random")
        add("--seed", type=int, default=20, help="of --dare (default 20)")
        text = "leave the token embeddings as the new base has them"
        add("--skip-embeddings", action="store_true", default=None, help=text)
        add("--old-base", metavar="A", help="their own base, if the recorded names for it lead nowhere")
        text = "use a base that is no descendant; it is recorded"
        add("--allow-unrelated", action="store_true", help=text)
        text = "permutation: match neurons and heads of a base that is not related (with --allow-unrelated)"
        add("--align", metavar="HOW", help=text)
        add_json(parser)

    def run(self, arguments: argparse.Namespace) -> int:
        from recyclable.carrying.changes import FoundChanges
        from recyclable.config.run_file import make_config
        from recyclable.recipes.apply import apply
        from recyclable.weights.store import find

        given = {name: getattr(arguments, name) for name in FoundChanges.model_fields}
        record = apply(
            [find(weights, arguments.store) for weights in arguments.weights],
            arguments.base,
            arguments.out,
            make_config(FoundChanges, {name: value for name, value in given.items() if value is not None}, "apply"),
            old_base=arguments.old_base,
            seed=arguments.seed,
            allow_unrelated=arguments.allow_unrelated,
            task=arguments.task,
            examples=arguments.examples,
        )
        tell(f"apply: done, see {arguments.out}")
        end(arguments, record)
        return 0


COMMAND = Apply()
