"""Starts `train_ranks.py` or its like on one or more ranks, as the `recyclable` command would, with a time limit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

SUPPORT = Path(__file__).parent
ROOT = SUPPORT.parents[1]  # of the repository
LAUNCH = (
    "import sys; from recyclable.launching.supervisor import launch; "
    "sys.exit(launch(sys.argv[1], sys.argv[2:], nproc={}))"
)
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
TIMEOUT_S = 400  # for a whole list of runs, on a busy machine
# Nothing stays whole on a rank at stage 3, however small.
NOTHING_WHOLE = {"stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": 0}
STAGE_3 = {**NOTHING_WHOLE, "stage3_prefetch_bucket_size": 0}


def start(
    folder: Path, runs: list[dict[str, Any]], nproc: int | None = None, script: str = "train_ranks.py"
) -> subprocess.Popen:
    """Start `runs` (see the script) in a session of their own; what they print goes to folder/log.

    Args:
        nproc: ranks, started by the deepspeed launcher; None is one process without any launcher.
        script: a file in this folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "runs.json").write_text(json.dumps(runs, default=str))
    environment = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment["OMP_NUM_THREADS"] = "1"
    launch = ["-c", LAUNCH.format(nproc)] if nproc else []
    command = [sys.executable, *launch, str(SUPPORT / script), str(folder / "runs.json")]
    with (folder / "log").open("w") as log:
        return subprocess.Popen(
            command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )


def finish(process: subprocess.Popen, folder: Path, timeout_s: float = TIMEOUT_S) -> None:
    """Wait for the end; AssertionError with the last lines printed if it is a failure or does not come in time."""
    try:
        status = process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        status = f"no end after {timeout_s} s"
    finally:
        kill(process)
    assert status == 0, f"{status}\n" + "\n".join((folder / "log").read_text().splitlines()[-40:])


def kill(process: subprocess.Popen) -> None:
    """SIGKILL to the process and all it started (ranks under a launcher end with it)."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def outcome(out: Path) -> dict[str, str]:
    """What a run ended with: {} or {error, message}."""
    return json.loads(Path(f"{out}.json").read_text())


def scalars(out: Path, tag: str) -> list[float]:
    """A scalar at steps 1, 2, ..., from the TensorBoard files of a run."""
    events = EventAccumulator(str(out / "tensorboard")).Reload().Scalars(tag)
    assert [event.step for event in events] == list(range(1, len(events) + 1))
    return [event.value for event in events]
