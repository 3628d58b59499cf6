"""Sharded start under ZeRO-3 beside the usual way: memory of each rank, bytes it reads, seconds until it can train.

    python benchmarks/sharded_start.py [--quick] [--json] [--scratch DIR]

Every rank starts a model from an upgraded base and a delta. Ours: `models` and `training.zero.materialize`, with the
digests of base and delta verified. The usual way: every rank calls `from_pretrained`, adds the whole delta, and lets
`deepspeed.initialize` partition.

Memory is RssAnon of /proc/self/status, sampled every 2 ms: the process's own pages, without the page cache. Its
baseline is the same process with everything imported and the process group up, before it has opened a weight.
Bytes read are the growth of rchar in /proc/self/io: all that the process asks the kernel for, cached or not. The usual
way maps its files into memory instead, which rchar does not see.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from big_models import LABELS, layers_for, make_world
from memory import MB, anonymous_bytes, peak

from recyclable.report.compare import table

RANKS = (2, 4)
START = (
    "import sys; from recyclable.launching.supervisor import launch; "
    "sys.exit(launch(sys.argv[1], sys.argv[2:], nproc={}))"
)
TIMEOUT_S = 900


def main() -> None:
    """Measure; print a table or, last, one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="a model of 0.25 GB instead of 1 GB, the usual way on 2 ranks only"
    )
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    parser.add_argument("--scratch", type=Path, help="where models are written (default: the temporary directory)")
    parser.add_argument("--way", choices=["ours", "usual"], help=argparse.SUPPRESS)  # what a rank is told
    parser.add_argument("--world", type=Path, help=argparse.SUPPRESS)
    arguments, _ = parser.parse_known_args()  # the launcher adds its own
    if arguments.way:
        rank(arguments.way, arguments.world)
        return
    result = measure(arguments.quick, arguments.scratch)
    print(report(result))
    if arguments.json:
        print(json.dumps(result))


def report(result: dict[str, dict[str, Any]]) -> str:
    """What `measure` found, as text for people."""
    named = {
        "start_mb": "MB before optimizer",
        "after_initialize_mb": "MB after initialize",
        "peak_mb": "MB at most",
        "read_mb": "MB read",
        "start_seconds": "s to start",
        "seconds": "s to engine",
    }
    rows = [
        {"ranks": ranks, "way": way, **{name: round(row[key], 1) for key, name in named.items()}}
        for ranks, figures in result.items()
        for way, row in figures["ways"].items()
    ]
    ratios = [
        f"{n} ranks: peak_ratio {f['peak_ratio']:.2f}, bytes_ratio {f['bytes_ratio']:.2f}" for n, f in result.items()
    ]
    return "\n\n".join(("sharded start, largest of all ranks; " + "; ".join(ratios), table(rows)))


def measure(quick: bool, scratch: Path | None = None) -> dict[str, dict[str, Any]]:
    """Ranks -> peak_ratio, bytes_ratio (the worst rank's) and the figures of both ways, the largest over ranks.

    peak_ratio: peak above the baseline until the optimizer exists, over 1.3 x model / ranks + 256 MB. bytes_ratio:
    bytes read over the rank's share of base + delta.
    """
    gigabytes, result = 0.25 if quick else 1.0, {}
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        world = make_world(Path(folder) / "world", layers_for(gigabytes), vocabulary=1000)
        for ranks in RANKS:
            both = not quick or ranks == min(RANKS)
            ways = {way: _run(way, world, ranks) for way in ("ours", *(("usual",) if both else ()))}
            ours = ways["ours"]
            result[str(ranks)] = {
                "peak_ratio": ours["start_mb"] / (1.3 * ours["model_mb"] / ranks + 256),
                "bytes_ratio": ours["read_mb"] / (ours["base_and_delta_mb"] / ranks),
                "ways": ways,
            }
    return result


def _run(way: str, world: Path, ranks: int) -> dict[str, float]:
    """The largest of each figure over all ranks of one run."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", START.format(ranks), __file__, "--way", way, "--world", str(world)]
    subprocess.run(command, env=environment, check=True, timeout=TIMEOUT_S, stdout=sys.stderr)
    rows = [json.loads((world / f"{way}-{rank}.json").read_text()) for rank in range(ranks)]
    return {name: max(row[name] for row in rows) for name in rows[0]}


# ---- what a rank does --------------------------------------------------------------------------------------------


def rank(way: str, world: Path) -> None:
    """Start a model one way, then an engine on it; write what it took to world/<way>-<rank>.json."""
    import torch

    from recyclable import distributed
    from recyclable.carrying.carried import Carried
    from recyclable.config.settings import TrainSettings
    from recyclable.models.tasks import outdated_model
    from recyclable.objectives.labelled import LabelledTask
    from recyclable.tasks.parts.task import Task
    from recyclable.training.engine import engine_for, materialize

    distributed.init()
    torch.set_num_threads(1)
    size = {"max_steps": 1, "train_batch_size": distributed.world_size(), "learning_rate": 1e-5}
    settings = TrainSettings(out=world, **size)
    ds_config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3},
        "tensorboard": {"enabled": False},
    }
    task = Task("none", "classification", tuple(LABELS), {}, "")
    distributed.barrier()
    baseline, read_before = anonymous_bytes(), _bytes_read()
    begin = time.perf_counter()
    with peak() as start:
        if way == "ours":
            carried = Carried.open(world / "weights", None, world / "new")
            objective = LabelledTask(outdated_model(carried, task, 20), task.kind)
            materialize(objective, settings, ds_config)
            carried.verify(distributed.Ranks())
        else:
            objective = LabelledTask(_usual_way(world), task.kind)
    read, start_seconds = _bytes_read() - read_before, time.perf_counter() - begin
    with peak() as whole, engine_for(objective, settings, ds_config, world):
        seconds, after = time.perf_counter() - begin, anonymous_bytes()
    elements = sum(getattr(p, "ds_numel", p.numel()) for p in objective.parameters())
    files = [world / "new" / "model.safetensors", world / "weights" / "delta.safetensors"]
    row = {
        "start_mb": (start[0] - baseline) / MB,
        "after_initialize_mb": (after - baseline) / MB,
        "peak_mb": (max(start[0], whole[0]) - baseline) / MB,
        "read_mb": read / MB,
        "start_seconds": start_seconds,
        "seconds": seconds,
        "baseline_mb": baseline / MB,
        "model_mb": elements * 4 / MB,
        "base_and_delta_mb": sum(file.stat().st_size for file in files) / MB,
    }
    (world / f"{way}-{distributed.rank()}.json").write_text(json.dumps(row))
    distributed.shutdown()


def _usual_way(world: Path):
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(world / "new", trust_remote_code=False)
    delta, head = (load_file(world / "weights" / f"{name}.safetensors") for name in ("delta", "head"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            short = name.removeprefix("bert.")
            parameter.copy_(parameter + delta[short] if short in delta else head[short])
    return model


def _bytes_read() -> int:
    return int(Path("/proc/self/io").read_text().splitlines()[0].split()[1])


if __name__ == "__main__":
    main()
