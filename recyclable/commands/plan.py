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
        add("--devices", type=int, metavar="N", help="ranks, one a device (default 1)")
        add("--hosts", type=int, metavar="H", help="that the devices are on (default 1)")
        add("--device", metavar="D", help="h100, a100-40gb, cpu ... (default: this machine's)")
        add(
            "--device-memory", metavar="SIZE", help="of each, as 80GB (default: the data sheet's, or what is free here)"
        )
        add("--host-memory", metavar="SIZE", help="of each host (default: as much as its devices have)")
        add("--nvme-path", metavar="DIR", help="on the hosts, for what is kept on NVMe (default /local_nvme)")
        add("--verb", choices=("pretrain", "tune", "recycle"), help="what is planned (default: as the settings say)")
        add("--deepspeed_config", metavar="F", help="plan this one alone: a file, or the name of a shipped one")
        add("--out", type=Path, metavar="FILE", help="write the ds_config to use")
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
        found = plan(settings, read_run_file(file, overrides), file or "plan", whole=file is not None)
        tell(table(found))
        if arguments.out is not None:
            _write(arguments.out, found["ds_config"])
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
