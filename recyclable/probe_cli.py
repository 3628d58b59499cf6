"""The `recyclable probe` command, on one process or several ranks: parses and dispatches, nothing else."""

from __future__ import annotations

import argparse
import json

from recyclable import rank
from recyclable.config import make_config
from recyclable.launcher import launch
from recyclable.resources import launch_script
from recyclable.store_cli import add_store_argument

_TEXT = "is it worth recycling? a verdict and its evidence, without training"


def add_parser(verbs: argparse._SubParsersAction) -> None:
    """`recyclable probe`."""
    sub = verbs.add_parser("probe", help=_TEXT, description=_TEXT)
    _add_arguments(sub)
    sub.add_argument("--nproc", type=int, metavar="N", help="local ranks that share the points (default 1)")
    sub.set_defaults(run=_start)


def rank_main(argv: list[str]) -> int:
    """One rank of a probe, as the launcher starts it (`launch/probe.py`); returns the exit status."""
    parser = argparse.ArgumentParser(prog="launch/probe.py", description=_TEXT)
    _add_arguments(parser)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the launcher adds it
    arguments = parser.parse_args(argv)

    from recyclable.training import distributed

    def work() -> None:
        distributed.init()
        _probe(arguments)

    return rank.one_of_ranks(work)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--weights", required=True, metavar="W", help="outdated weights: a directory, or a name")
    add_store_argument(parser)
    parser.add_argument("--base", required=True, metavar="B", help="the new base")
    parser.add_argument("--old-base", metavar="A", help="their own base, where manifest and lineage lead nowhere")
    parser.add_argument("--task", metavar="T", help="try them on its dev set; without it only weights are looked at")
    parser.add_argument("--examples", type=int, metavar="N", help="of dev (default 300)")
    parser.add_argument("--points", type=int, metavar="N", help="of the path from old to new model (default 11)")
    parser.add_argument("--to", metavar="W2", help="weights tuned on the new base: the path leads to them")
    parser.add_argument("--allow-unrelated", action="store_true", help="the new base need be no descendant of theirs")
    parser.add_argument("--out", metavar="DIR", help="where a page, TensorBoard files and probe.json go")
    parser.add_argument("--resume", action="store_true", help="go on with the probe in --out")
    parser.add_argument("--json", action="store_true", help="end with one JSON object")


def _start(arguments: argparse.Namespace) -> int:
    if arguments.nproc in (None, 1):
        _probe(arguments)
        return 0
    argv = [f"--{flag.replace('_', '-')}" for flag in ("resume", "json", "allow_unrelated") if getattr(arguments, flag)]
    for name, value in _chosen(arguments).items():
        if not isinstance(value, bool):
            argv += [f"--{name.replace('_', '-')}", str(value)]
    return launch(launch_script("probe"), argv, nproc=arguments.nproc)


def _chosen(arguments: argparse.Namespace) -> dict[str, object]:
    from recyclable.recipes.probe import ProbeConfig

    given = {name: getattr(arguments, name) for name in ProbeConfig.model_fields}
    return {name: value for name, value in given.items() if value is not None}


def _probe(arguments: argparse.Namespace) -> None:
    from recyclable.recipes.probe import ProbeConfig, probe
    from recyclable.report.probe_page import summary
    from recyclable.training import distributed

    result, verdict = probe(make_config(ProbeConfig, _chosen(arguments), "probe"), arguments.resume)
    if distributed.is_main():
        print(summary(result, verdict.reason), flush=True)
        if arguments.json:
            print(json.dumps(result), flush=True)
