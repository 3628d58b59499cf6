"""The `recyclable` command: parses and dispatches, nothing else."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import recyclable
from recyclable import rank
from recyclable.config import StartSettings, make_config
from recyclable.errors import InputError
from recyclable.launcher import launch
from recyclable.probe_cli import add_parser as add_probe_parser
from recyclable.resources import launch_script
from recyclable.store_cli import add_parsers, add_store_argument

_TRAINING = {
    "pretrain": "continual pre-training: base + corpus -> upgraded base",
    "tune": "base + task -> adapted weights",
    "recycle": "outdated weights + old base + new base + task -> adapted weights of the new base",
    "study": "a restartable grid of the three above; one tidy results file",
}


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0 done, 1 failed while running, 2 bad input."""
    arguments = rank.parse(_parser(), argv)
    status = 0

    def work() -> None:
        nonlocal status
        status = arguments.run(arguments)

    return rank.guarded(work) or status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="recyclable", description=recyclable.__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    for verb, text in _TRAINING.items():
        sub = verbs.add_parser(verb, help=text, description=text)
        rank.add_arguments(sub)
        sub.add_argument("--nproc", type=int, metavar="N", help="local ranks (default 1), or per host of the hostfile")
        sub.add_argument("--hostfile", metavar="F", help="hosts and slots of a cluster, for the deepspeed launcher")
        sub.set_defaults(run=_train)

    text = "score adapted weights; several are compared"
    sub = verbs.add_parser("evaluate", help=text, description=text)
    sub.add_argument("--weights", required=True, nargs="+", metavar="W", help="adapted weights: directories, or names")
    add_store_argument(sub)
    sub.add_argument("--base", required=True, metavar="B", help="the model they go on: their own base or a descendant")
    sub.add_argument("--task", required=True, metavar="T", help="task directory or file")
    sub.add_argument("--old-base", metavar="A", help="their own base, if the manifest's name for it leads nowhere")
    sub.add_argument("--split", default="test")
    sub.add_argument("--plot", type=Path, metavar="PNG", help="save the dev curves of the runs")
    sub.add_argument("--json", action="store_true", help="end with one JSON object")
    sub.set_defaults(run=_evaluate)

    text = "put outdated weights on a new base, without training"
    sub = verbs.add_parser("apply", help=text, description=text)
    sub.add_argument("--weights", required=True, nargs="+", metavar="W", help="adapted weights; several are merged")
    add_store_argument(sub)
    sub.add_argument("--base", required=True, metavar="B", help="the model they go on: their own base or a descendant")
    sub.add_argument(
        "--out", required=True, type=Path, metavar="DIR", help="a new directory, plain transformers or PEFT"
    )
    text = "strength of the difference (default 1); auto finds one for each layer group on --task, by forward passes"
    sub.add_argument("--scale", default=1.0, metavar="S", help=text)
    sub.add_argument("--task", metavar="T", help="task directory or file for --scale auto")
    sub.add_argument("--examples", type=int, default=128, metavar="N", help="of its dev examples (default 128)")
    sub.add_argument("--ties", type=float, metavar="DENSITY", help="keep this share, the largest, of each difference")
    sub.add_argument("--dare", type=float, metavar="RATE", help="drop this share of each difference at random")
    sub.add_argument("--seed", type=int, default=20, help="of --dare (default 20)")
    sub.add_argument(
        "--skip-embeddings", action="store_true", help="leave the token embeddings as the new base has them"
    )
    sub.add_argument("--old-base", metavar="A", help="their own base, if the manifest's name for it leads nowhere")
    sub.add_argument("--allow-unrelated", action="store_true", help="use a base that is no descendant; it is recorded")
    text = "permutation: match neurons and heads of a base that is not related (with --allow-unrelated)"
    sub.add_argument("--align", metavar="HOW", help=text)
    sub.add_argument("--json", action="store_true", help="end with one JSON object")
    sub.set_defaults(run=_apply)

    add_probe_parser(verbs)
    add_parsers(verbs)

    text = "where a base comes from, and bases that were upgraded elsewhere"
    lineage = verbs.add_parser("lineage", help=text, description=text).add_subparsers(required=True, metavar="VERB")
    sub = lineage.add_parser("show", help="a base's fingerprint and ancestors")
    sub.add_argument("base", metavar="B")
    sub.add_argument("--json", action="store_true", help="end with one JSON object")
    sub.set_defaults(run=_lineage_show)
    sub = lineage.add_parser("declare", help="record that a base was upgraded from another outside recyclable")
    sub.add_argument("base", metavar="B")
    sub.add_argument("--parent", required=True, metavar="A")
    sub.set_defaults(run=_lineage_declare)

    text = "the whole story on this machine: real text, a few minutes on 2 CPU cores"
    sub = verbs.add_parser("quickstart", help=text, description=text)
    sub.add_argument("--base", metavar="B", help="start from this base instead of a small one made here")
    sub.add_argument("--corpus", metavar="C", help="upgrade on this text instead of documentation strings")
    sub.add_argument("--task", metavar="T", help="this task instead of telling libraries from their documentation")
    sub.add_argument("--out", type=Path, default=Path("quickstart"), metavar="DIR")
    sub.add_argument("--nproc", type=int, default=2, metavar="N", help="local ranks (default 2)")
    sub.add_argument("--deepspeed_config", metavar="F", help="a file, or the name of a shipped one (default: cpu)")
    sub.add_argument("--json", action="store_true", help="end with one JSON object")
    sub.set_defaults(run=_quickstart)
    return parser


def _train(arguments: argparse.Namespace) -> int:
    """Check what can be checked without starting ranks, then run."""
    rank.read(arguments.verb, arguments)
    argv = [arguments.config, *arguments.overrides]
    for option in ("deepspeed_config", "out"):
        if (value := getattr(arguments, option)) is not None:
            argv += [f"--{option}", value]
    argv += [f"--{flag}" for flag in ("resume", "json") if getattr(arguments, flag)]
    return _start(arguments.verb, argv, arguments.nproc, arguments.hostfile)


def _start(verb: str, argv: list[str], nproc: int | None, hostfile: str | None = None) -> int:
    """Run a training verb in this process, or on several ranks through the deepspeed launcher."""
    if nproc is not None and nproc < 1:
        raise InputError("--nproc", f"found {nproc}, expected at least 1")
    if nproc in (None, 1) and hostfile is None:
        return rank.rank_main(verb, argv)
    return launch(launch_script(verb), argv, nproc=nproc, hostfile=hostfile)


def _evaluate(arguments: argparse.Namespace) -> int:
    from recyclable.recipes.evaluate import evaluate_all
    from recyclable.report.compare import table
    from recyclable.weights.store import find

    rows = evaluate_all(
        [find(weights, arguments.store) for weights in arguments.weights],
        arguments.base,
        arguments.task,
        old_base=arguments.old_base,
        split=arguments.split,
        png=arguments.plot,
    )
    print(table(rows))
    if arguments.json:
        print(json.dumps({"runs": rows}))
    return 0


def _apply(arguments: argparse.Namespace) -> int:
    from recyclable.recipes.apply import apply
    from recyclable.weights.store import find

    chosen = {name: getattr(arguments, name) for name in StartSettings.model_fields}
    record = apply(
        [find(weights, arguments.store) for weights in arguments.weights],
        arguments.base,
        arguments.out,
        make_config(StartSettings, chosen, "apply"),
        old_base=arguments.old_base,
        seed=arguments.seed,
        allow_unrelated=arguments.allow_unrelated,
        task=arguments.task,
        examples=arguments.examples,
    )
    print(f"apply: done, see {arguments.out}")
    if arguments.json:
        print(json.dumps(record))
    return 0


def _lineage_show(arguments: argparse.Namespace) -> int:
    from recyclable.recipes.lineage import show

    shown = show(arguments.base)
    for ancestor in [{"name": arguments.base, "fingerprint": shown["fingerprint"]}, *shown["ancestors"]]:
        claim = "  (declared by the user to be the parent)" if ancestor.get("declared") else ""
        print(f"{ancestor['fingerprint']['weights'][:12]}  {ancestor['name']}{claim}")
    if arguments.json:
        print(json.dumps(shown))
    return 0


def _lineage_declare(arguments: argparse.Namespace) -> int:
    from recyclable.recipes.lineage import declare

    declare(arguments.base, arguments.parent)
    print(f"{arguments.base}: recorded {arguments.parent} as its parent, as your claim")
    return 0


def _quickstart(arguments: argparse.Namespace) -> int:
    from recyclable.recipes.quickstart import quickstart

    chosen = ["--deepspeed_config", arguments.deepspeed_config] if arguments.deepspeed_config else []

    def run_study(file: Path) -> int:
        return _start("study", [str(file), *chosen], arguments.nproc)

    result = quickstart(arguments.out, arguments.base, arguments.corpus, arguments.task, run_study)
    if result is None:
        return 1
    if arguments.json:
        print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
