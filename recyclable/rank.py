"""What one rank does with a run config: read, check, run the recipe, end with the right exit status."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from importlib import import_module
from typing import Any

from recyclable import machine
from recyclable.config import (
    TRAINING_FREE,
    PretrainConfig,
    RecycleConfig,
    Settings,
    StudyConfig,
    TuneConfig,
    load_config,
)
from recyclable.errors import InputError
from recyclable.resources import default_ds_config

RUN_CONFIGS: dict[str, type[Settings]] = {
    "pretrain": PretrainConfig,
    "tune": TuneConfig,
    "recycle": RecycleConfig,
    "study": StudyConfig,
}
_PATIENCE_S = 30  # how long other ranks let rank 0 speak; then they have found something that it has not


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of every verb that takes a run config."""
    parser.add_argument("config", metavar="run.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings over the file's")
    parser.add_argument("--deepspeed_config", metavar="F", help="a file, or the name of a shipped one (default: cpu)")
    parser.add_argument("--out", metavar="DIR", help="over the file's `out`")
    parser.add_argument("--resume", action="store_true", help="go on from the last complete checkpoint")
    parser.add_argument("--json", action="store_true", help="end with one JSON object")


def parse(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """Parse, with key=value settings wherever they stand; argparse alone wants them right behind run.yaml."""
    arguments, rest = parser.parse_known_args(argv)
    settings = [argument for argument in rest if not argument.startswith("-")]
    if len(settings) < len(rest) or (settings and not hasattr(arguments, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if settings:
        arguments.overrides = [*arguments.overrides, *settings]
    return arguments


def read(verb: str, arguments: argparse.Namespace) -> tuple[Settings, dict[str, Any]]:
    """The run config and the ds_config that the arguments name."""
    out = [f"out={json.dumps(arguments.out)}"] if arguments.out else []
    config = load_config(RUN_CONFIGS[verb], arguments.config, [*arguments.overrides, *out])
    return config, machine.load_ds_config(_ds_config(arguments))


def rank_main(verb: str, argv: list[str]) -> int:
    """One rank of a training verb, as the launcher starts it (`launch/<verb>.py`); returns the exit status."""
    parser = argparse.ArgumentParser(prog=f"launch/{verb}.py")
    add_arguments(parser)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the launcher adds it
    arguments = parse(parser, argv)

    from recyclable.training import distributed

    def work() -> None:
        config, ds_config = read(verb, arguments)
        distributed.init()
        _require_batches(config, ds_config, arguments, distributed.world_size())
        result = _run(verb, config, ds_config, arguments.resume)
        if distributed.is_main():
            print(f"{verb}: done, see {config.out}", flush=True)
            if arguments.json:
                print(json.dumps(result, default=str), flush=True)

    return one_of_ranks(work)


def one_of_ranks(work: Callable[[], Any]) -> int:
    """As `guarded`, on one of several ranks, whose process group is left at the end."""
    from recyclable.training import distributed

    try:
        return guarded(work, speaks=os.environ.get("RANK", "0") == "0")
    finally:
        distributed.shutdown()


def guarded(work: Callable[[], Any], speaks: bool = True) -> int:
    """Run `work`; returns 0, or 2 after one line on standard error for bad input."""
    try:
        work()
    except InputError as error:
        if not speaks:
            # The launcher ends all ranks with the first that ends, so rank 0, which found the same, speaks before that.
            time.sleep(_PATIENCE_S)
        print(f"recyclable: error: {error}", file=sys.stderr, flush=True)
        return InputError.exit_status
    return 0


def _ds_config(arguments: argparse.Namespace) -> str:
    return arguments.deepspeed_config or str(default_ds_config())


def _require_batches(
    config: Settings, ds_config: dict[str, Any], arguments: argparse.Namespace, world_size: int
) -> None:
    """InputError when a run config, the ds_config and the ranks do not go together; before `out` is touched."""
    from recyclable.recipes.study_plan import plan

    runs = [run for cell in plan(config) for run in cell.possible] if isinstance(config, StudyConfig) else [config]
    for run in runs:
        if getattr(run, "method", None) not in TRAINING_FREE:
            machine.merge(
                ds_config,
                where=_ds_config(arguments),
                run=arguments.config,
                train_batch_size=run.train_batch_size,
                max_grad_norm=run.max_grad_norm,
                world_size=world_size,
            )


def _run(verb: str, config: Settings, ds_config: dict[str, Any], resume: bool) -> dict[str, Any]:
    return getattr(import_module(f"recyclable.recipes.{verb}"), verb)(config, ds_config, resume)
