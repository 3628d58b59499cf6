"""Training-free recycling under ZeRO-3: no rank ever holds a whole model. Memory of each rank, 2 ranks.

    python benchmarks/sharded_apply.py [--quick] [--json] [--scratch DIR]

`recyclable recycle` with `method: apply` and with `method: project` (learned on one task that is known on both bases,
its strength found on a few texts), on a random BERT; everything runs: start, search, scores, the weights written.
Memory is RssAnon of /proc/self/status, sampled every 2 ms, above the same process with everything imported and the
process group up; glibc is told to give back blocks of 1 MB and more as soon as they are free. Figures, for each method,
the largest of all ranks:
- `peak_mb`, `model_mb` (fp32);
- `peak_ratio`: peak over 1.3 x model / ranks + 256 MB; 1 or less is what is wanted.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from big_models import layers_for, make_task, make_world, tune_another
from memory import MB, anonymous_bytes, peak
from sharded_start import START, TIMEOUT_S

from recyclable.report.compare import table

RANKS = 2
METHODS = ("apply", "project")
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
"""glibc keeps freed blocks for later, gathered layers among them: without this, what was held counts as if it were."""
DS_CONFIG = {
    "train_micro_batch_size_per_gpu": 1,
    "tensorboard": {"enabled": False},
    "zero_optimization": {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "stage3_max_live_parameters": 0,
        "stage3_prefetch_bucket_size": 0,
        "stage3_max_reuse_distance": 0,
    },
}


def main() -> None:
    """Measure; print a table and, last, one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a model of 0.25 GB instead of 1 GB")
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    parser.add_argument("--scratch", type=Path, help="where models are written (default: the temporary directory)")
    parser.add_argument("--method", choices=METHODS, help=argparse.SUPPRESS)  # what a rank is told
    parser.add_argument("--world", type=Path, help=argparse.SUPPRESS)
    arguments, _ = parser.parse_known_args()  # the launcher adds its own
    if arguments.method:
        rank(arguments.method, arguments.world)
        return
    result = measure(arguments.quick, arguments.scratch)
    print(table([{"method": method, **figures} for method, figures in result.items()]))
    if arguments.json:
        print(json.dumps({"ranks": RANKS, **result}))


def measure(quick: bool, scratch: Path | None = None) -> dict[str, dict[str, float]]:
    """Method -> its figures, the worst rank's."""
    result = {}
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        world = make_world(Path(folder) / "world", layers_for(0.25 if quick else 1.0), vocabulary=1000, tokenizer=True)
        make_task(world / "task")
        tune_another(world)
        for method in METHODS:
            environment = {**os.environ, "OMP_NUM_THREADS": "1", **GIVE_BACK}
            command = [sys.executable, "-c", START.format(RANKS), __file__, "--method", method, "--world", str(world)]
            subprocess.run(command, env=environment, check=True, timeout=TIMEOUT_S, stdout=sys.stderr)
            rows = [json.loads((world / f"{method}-{number}.json").read_text()) for number in range(RANKS)]
            figures = {name: max(row[name] for row in rows) for name in rows[0]}
            allowed = 1.3 * figures["model_mb"] / RANKS + 256
            result[method] = {**figures, "peak_ratio": figures["peak_mb"] / allowed}
    return result


def rank(method: str, world: Path) -> None:
    """Recycle by one method; write what it took to world/<method>-<rank>.json."""
    import torch

    import recyclable.recipes.recycle  # its imports belong to the baseline
    from recyclable import distributed
    from recyclable.recipes.recycle_settings import read_recycle_settings

    distributed.init()
    torch.set_num_threads(1)
    content: dict[str, Any] = {
        "method": method,
        "base": str(world / "new"),
        "old_base": str(world / "old"),
        "weights": str(world / "weights"),
        "task": str(world / "task"),
        "out": str(world / f"out-{method}"),
        "max_length": 16,
        "eval_batch_size": 2,
        "max_dev_examples": 4,
        "max_test_examples": 4,
    }
    if method == "project":
        content.update(project_from=[[str(world / "other-old"), str(world / "other-new")]], strength_examples=4)
    settings = read_recycle_settings(content, "benchmark")
    distributed.barrier()
    baseline = anonymous_bytes()
    with peak() as most:
        recyclable.recipes.recycle.recycle(settings, DS_CONFIG)
    model = (world / "new" / "model.safetensors").stat().st_size
    row = {"peak_mb": (most[0] - baseline) / MB, "model_mb": model / MB}
    (world / f"{method}-{distributed.rank()}.json").write_text(json.dumps(row))
    distributed.shutdown()


if __name__ == "__main__":
    main()
