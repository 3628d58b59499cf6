"""The `recyclable` command: parses, dispatches, turns mistakes into one line and exit status 2."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from recyclable.config import (
    PretrainConfig,
    RecycleConfig,
    Settings,
    StudyConfig,
    TuneConfig,
    load_config,
)
from recyclable.errors import InputError
from recyclable.resources import launch_script

RUN_CONFIGS: dict[str, type[Settings]] = {
    "pretrain": PretrainConfig,
    "tune": TuneConfig,
    "recycle": RecycleConfig,
    "study": StudyConfig,
}
_HELP = {
    "pretrain": "continual pre-training: base + corpus -> upgraded base",
    "tune": "base + task -> adapted weights",
    "recycle": "outdated weights + old base + new base + task -> adapted weights of the new base",
    "study": "a restartable grid of the three above; one tidy results file",
}
_PATIENCE_S = 30  # how long other ranks let rank 0 speak; then they have found something that it has not


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0 done, 1 failed while running, 2 bad input."""
    arguments = _parser().parse_args(argv)
    return _guarded(lambda: arguments.run(arguments), main_rank=True)


def rank_main(verb: str, argv: list[str]) -> int:
    """One rank of a training verb, as the launcher starts it (`launch/<verb>.py`); returns the exit status."""
    parser = argparse.ArgumentParser(prog=f"launch/{verb}.py")
    _training_arguments(parser)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)

    from recyclable.training import distributed

    def work() -> None:
        config, ds_config = _read(verb, arguments)
        distributed.init()
        _require_batches(config, ds_config, arguments, distributed.world_size())
        _recipe(verb, config, ds_config, arguments)

    try:
        return _guarded(work, main_rank=os.environ.get("RANK", "0") == "0")
    finally:
        distributed.shutdown()


def _guarded(work: Callable[[], Any], main_rank: bool) -> int:
    try:
        work()
    except InputError as error:
        if not main_rank:
            # The launcher ends all ranks with the first that ends, so rank 0, which found the same, speaks before that.
            time.sleep(_PATIENCE_S)
        print(f"recyclable: error: {error}", file=sys.stderr, flush=True)
        return InputError.exit_status
    except SystemExit as ended:
        return ended.code
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="recyclable", description=sys.modules["recyclable"].__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb, text in _HELP.items():
        sub = verbs.add_parser(verb, help=text, description=text)
        _training_arguments(sub)
        sub.add_argument(
            "--nproc", type=int, metavar="N", help="ranks on this host (default 1) or on each of the hostfile's"
        )
        sub.add_argument("--hostfile", metavar="F", help="hosts and slots of a cluster, for the deepspeed launcher")
        sub.set_defaults(run=_train)
    sub = verbs.add_parser("evaluate", help="score adapted weights; several are compared")
    sub.add_argument("--weights", required=True, nargs="+", metavar="W", help="directories of adapted weights")
    sub.add_argument(
        "--base", required=True, metavar="B", help="the model they are put on: their own base or a descendant"
    )
    sub.add_argument("--task", required=True, metavar="T", help="task directory or file")
    sub.add_argument(
        "--old-base", metavar="A", help="their own base, where the manifest's name for it is no longer right"
    )
    sub.add_argument("--split", default="test")
    sub.add_argument("--plot", type=Path, metavar="PNG", help="save the dev curves of the runs")
    sub.add_argument("--json", action="store_true", help="end with one JSON object")
    sub.set_defaults(run=_evaluate)
    sub = verbs.add_parser(
        "quickstart", help="the whole story on this machine, real text, a few minutes on 2 CPU cores"
    )
    sub.add_argument("--base", metavar="B", help="start from this base instead of a small one made here")
    sub.add_argument("--corpus", metavar="C", help="upgrade on this text instead of documentation strings")
    sub.add_argument("--task", metavar="T", help="this task instead of telling modules from their documentation")
    sub.add_argument("--out", type=Path, default=Path("quickstart"), metavar="DIR")
    sub.add_argument("--nproc", type=int, default=2, metavar="N")
    sub.add_argument("--deepspeed_config", metavar="F")
    sub.add_argument("--json", action="store_true", help="end with one JSON object")
    sub.set_defaults(run=_quickstart)
    return parser


def _training_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="run.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings over the file's")
    parser.add_argument(
        "--deepspeed_config", metavar="F", help="a file, or the name of one that is shipped (default: cpu)"
    )
    parser.add_argument("--out", metavar="DIR", help="over the file's `out`")
    parser.add_argument("--resume", action="store_true", help="go on from the last complete checkpoint")
    parser.add_argument("--json", action="store_true", help="end with one JSON object")


def _read(verb: str, arguments: argparse.Namespace) -> tuple[Settings, dict[str, Any]]:
    from recyclable import machine

    out = [f"out={json.dumps(arguments.out)}"] if arguments.out else []
    config = load_config(RUN_CONFIGS[verb], arguments.config, [*arguments.overrides, *out])
    return config, machine.load_ds_config(arguments.deepspeed_config or _default_ds_config())


def _require_batches(
    config: Settings, ds_config: dict[str, Any], arguments: argparse.Namespace, world_size: int
) -> None:
    """InputError when a run config, the ds_config and the ranks do not go together; before `out` is touched."""
    from recyclable import machine
    from recyclable.recipes.study_plan import plan

    runs = [run for cell in plan(config) for run in cell.possible] if isinstance(config, StudyConfig) else [config]
    for run in runs:
        if getattr(run, "method", None) != "apply":
            machine.merge(
                ds_config,
                where=arguments.deepspeed_config or _default_ds_config(),
                run=arguments.config,
                train_batch_size=run.train_batch_size,
                max_grad_norm=run.max_grad_norm,
                world_size=world_size,
            )


def _default_ds_config() -> str:
    from recyclable.resources import default_ds_config

    return str(default_ds_config())


def _train(arguments: argparse.Namespace) -> None:
    """Check what can be checked without starting ranks, then run."""
    _read(arguments.verb, arguments)
    own = [arguments.config, *arguments.overrides]
    for option in ("deepspeed_config", "out"):
        if (value := getattr(arguments, option)) is not None:
            own += [f"--{option}", value]
    own += [f"--{flag}" for flag in ("resume", "json") if getattr(arguments, flag)]
    if status := _start(arguments.verb, own, arguments.nproc, arguments.hostfile):
        sys.exit(status)


def _start(verb: str, argv: list[str], nproc: int | None, hostfile: str | None = None) -> int:
    """Run a training verb in this process, or on several ranks through the deepspeed launcher."""
    from recyclable.launcher import launch

    if nproc is not None and nproc < 1:
        raise InputError("--nproc", f"found {nproc}, expected at least 1")
    if nproc in (None, 1) and hostfile is None:
        return rank_main(verb, argv)
    return launch(launch_script(verb), argv, nproc=nproc, hostfile=hostfile)


def _recipe(verb: str, config: Settings, ds_config: dict[str, Any], arguments: argparse.Namespace) -> None:
    from recyclable.training import distributed

    if verb == "study":
        from recyclable.recipes.study import collect, study
        from recyclable.report.study_report import write_study_report

        study(config, ds_config)
        result = write_study_report(collect(config), config.out) if distributed.is_main() else {}
    else:
        recipe = getattr(import_module(f"recyclable.recipes.{verb}"), verb)
        result = recipe(config, ds_config, arguments.resume)
    if distributed.is_main():
        print(f"{verb}: done, see {config.out}", flush=True)
        if arguments.json:
            print(json.dumps(result, default=str), flush=True)


def _evaluate(arguments: argparse.Namespace) -> None:
    from recyclable.recipes.evaluate import evaluate
    from recyclable.report.compare import compare, plot, table
    from recyclable.weights.adapted import AdaptedWeights

    opened = {folder: AdaptedWeights(folder) for folder in arguments.weights}
    rows = compare({folder: vars(weights.manifest) for folder, weights in opened.items()})
    split = arguments.split
    for row, weights in zip(rows, opened.values(), strict=True):
        del row["test"]  # what the run itself measured; here it is measured anew
        scores = evaluate(weights, arguments.base, arguments.task, old_base=arguments.old_base, split=split)
        row.update(weights=str(weights.folder), method=weights.manifest.method)
        row.update({f"{split}_{name}": value for name, value in scores.items()})
    print(table(rows))
    if arguments.plot:
        plot({"dev": {f: [vars(w.manifest)] for f, w in opened.items()}}, arguments.plot)
    if arguments.json:
        print(json.dumps({"runs": rows}))


def _quickstart(arguments: argparse.Namespace) -> None:
    from recyclable.recipes.quickstart import quickstart

    def run_study(file: Path) -> None:
        config = ["--deepspeed_config", arguments.deepspeed_config] if arguments.deepspeed_config else []
        if status := _start("study", [str(file), *config], arguments.nproc):
            sys.exit(status)

    result = quickstart(arguments.out, arguments.base, arguments.corpus, arguments.task, run_study)
    if arguments.json:
        print(json.dumps(result))


if __name__ == "__main__":
    sys.exit(main())
