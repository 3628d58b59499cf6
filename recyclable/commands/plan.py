"""`recyclable plan`: memory and time of a run for every ZeRO stage and offload, and the ds_config to use."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from recyclable.commands.parts.command import Command, add_json, end, tell
from recyclable.errors import InputError


class Plan(Command):
    """In this process alone; nothing is downloaded but a config."""

    text = "memory and time of a run for every ZeRO stage and offload, and the ds_config to use"
    place = 85

    def arguments(self, parser: argparse.ArgumentParser) -> None:
        add = parser.add_argument
        add("config", nargs="?", metavar="run.yaml", help="the run that is planned; its corpus and task are not opened")
        add("overrides", nargs="*", metavar="key=value", help="settings over the file's, or without one")
        text = "a directory with config.json, that file, or a hub name (only that is fetched; default: the run's base)"
        add("--model", metavar="M", help=text)
        add("--devices", type=int, metavar="N", help="ranks, one a device (default 1; with --scale at most, 1,024)")
        text = "that the devices are on (default 1; with --scale one for 8, or for each that is a CPU)"
        add("--hosts", type=int, metavar="H", help=text)
        add("--device", metavar="D", help="h100, a100-40gb, cpu ... (default: this machine's)")
        add(
            "--device-memory", metavar="SIZE", help="of each, as 80GB (default: the data sheet's, or what is free here)"
        )
        add("--host-memory", metavar="SIZE", help="of each host (default: as much as its devices have)")
        add("--nvme-path", metavar="DIR", help="on the hosts, for what is kept on NVMe (default /local_nvme)")
        add("--verb", choices=("pretrain", "tune", "recycle"), help="what is planned (default: as the settings say)")
        add("--deepspeed_config", metavar="F", help="plan this one alone: a file, or the name of a shipped one")
        add("--mfu", type=float, metavar="X", help="share of a device's FLOP/s that training reaches (default 0.4)")
        text = "instead: step time, MFU, memory and regime on 8, 16 ... devices (default: of models from 125M to 70B)"
        add("--scale", action="store_const", const=True, help=text)
        text = "with --scale: of a step, where no train_batch_size is given for all together (default 16384)"
        add("--tokens-per-device", type=int, metavar="T", help=text)
        add("--out", type=Path, metavar="FILE", help="write the ds_config to use; with --scale a plot (.png, .svg)")
        add_json(parser)

    def run(self, arguments: argparse.Namespace) -> int:
        from recyclable.config.run_file import make_config, read_run_file
        from recyclable.recipes.plan import plan
        from recyclable.recipes.plan_settings import PlanSettings
        from recyclable.report.plan_table import table

        given = {name: getattr(arguments, name) for name in PlanSettings.model_fields}
        settings = make_config(PlanSettings, {n: value for n, value in given.items() if value is not None}, "plan")
        file, overrides = arguments.config, list(arguments.overrides)
        if file is not None and "=" in file and not Path(file).exists():
            file, overrides = None, [file, *overrides]
        run, where, whole = read_run_file(file, overrides), file or "plan", file is not None
        if settings.scale:
            return _scale(arguments, settings, run, where, whole)
        found = plan(settings, run, where, whole)
        tell(table(found))
        if arguments.out is not None:
            _write(arguments.out, found["ds_config"])
        end(arguments, found)
        return 0


def _scale(arguments: argparse.Namespace, settings: Any, run: dict[str, Any], where: object, whole: bool) -> int:
    from recyclable.recipes.plan_scale import plan_scale
    from recyclable.report.compare import require_plottable
    from recyclable.report.plan_scale import plot, table

    if arguments.out is not None:
        require_plottable(arguments.out, "--out")
    found = plan_scale(settings, run, where, whole)
    tell(table(found))
    if arguments.out is not None:
        plot(found, arguments.out)
    end(arguments, found)
    return 0


def _write(file: Path, ds_config: dict[str, Any] | None) -> None:
    if ds_config is None:
        raise InputError("--out", f"{file} is not written: nothing fits")
    try:
        file.write_text(json.dumps(ds_config, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise InputError("--out", f"{file} cannot be written ({error.strerror})") from error


COMMAND = Plan()
