"""Seconds per step that `recyclable plan` predicts for this CPU, against what real runs take.

    python benchmarks/plan_time.py [--json] [--rounds N]

Each configuration is a pre-training run of a few steps on a random model, its ranks forked as in benchmarks/plan.py, as
many threads each as there are cores for it. The machine's rates are measured beside each run, before and after it,
as a plan does (planning/devices.py). Rounds go through all configurations by turns; of each the quickest step and the
best rates count, since whatever else runs on the machine only slows down. Never read a single round on a busy machine.
The last line with `--json`: {"configurations": [{"name", "predicted_s", "measured_s", "ratio"}]}.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest.mock import patch

from plan import _forked, _settings, make_base, make_texts
from plan_configurations import BERT, LLAMA, SMALL_BUCKETS, Configuration

_RUN = {"max_length": 64, "train_batch_size": 8, "max_steps": 8}
_ENCODER = {**BERT, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6, "vocab_size": 5000}
_DECODER = {**LLAMA, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6, "vocab_size": 5000}
RUNS = (
    Configuration("encoder, ZeRO-1", "pretrain", _ENCODER, _RUN, {"stage": 1}),
    Configuration("decoder, ZeRO-1", "pretrain", _DECODER, _RUN, {"stage": 1}),
    Configuration("encoder, ZeRO-1, 2 ranks", "pretrain", _ENCODER, _RUN, {"stage": 1, **SMALL_BUCKETS}, {}, 2),
    Configuration("decoder, ZeRO-3", "pretrain", _DECODER, _RUN, {"stage": 3}),
    Configuration("decoder, ZeRO-3, 2 ranks", "pretrain", _DECODER, _RUN, {"stage": 3, **SMALL_BUCKETS}, {}, 2),
)


def main() -> None:
    """Run, print a table and, last, one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    parser.add_argument("--rounds", type=int, default=3, help="of all configurations (default: 3)")
    arguments = parser.parse_args()
    os.environ["DS_ACCELERATOR"] = "cpu"
    best: dict[str, dict[str, float]] = {}
    for _ in range(arguments.rounds):
        for one in RUNS:
            with tempfile.TemporaryDirectory() as name:
                (Path(name) / "configuration.json").write_text(json.dumps(asdict(one)))
                rows = _forked(timed, Path(name), one.ranks)
            found = {"predicted_s": min(row["predicted_s"] for row in rows), "measured_s": rows[0]["measured_s"]}
            known = best.setdefault(one.name, found)
            best[one.name] = {key: min(value, known[key]) for key, value in found.items()}
    print(f"{'configuration':30} {'predicted s':>12} {'measured s':>12} {'ratio':>6}")
    rows = [{"name": name, **row, "ratio": row["predicted_s"] / row["measured_s"]} for name, row in best.items()]
    for row in rows:
        print(f"{row['name']:30} {row['predicted_s']:12.3f} {row['measured_s']:12.3f} {row['ratio']:6.2f}")
    if arguments.json:
        print(json.dumps({"configurations": rows}))


def timed(folder: Path) -> dict[str, float]:
    """On each rank: what a plan says, and the quickest step."""
    import deepspeed
    import torch

    from recyclable import distributed
    from recyclable.planning.devices import this_cpu
    from recyclable.planning.memory import traced
    from recyclable.planning.states import Sizes
    from recyclable.planning.time import Fleet, seconds
    from recyclable.recipes.planned import planned
    from recyclable.recipes.pretrain import pretrain

    if distributed.is_main():
        _write(folder)
    distributed.barrier()
    one, settings, ds_config = _settings(folder)
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(max(1, cores // one.ranks))
    plan = planned(settings)
    flops = traced(plan.objective, plan.batch(ds_config["train_micro_batch_size_per_gpu"]), ds_config, True).flops
    sizes, ends = Sizes.of(plan.objective), []
    step = deepspeed.DeepSpeedEngine.step

    def noted(engine: Any, *given: Any, **more: Any) -> Any:
        done = step(engine, *given, **more)
        ends.append(time.perf_counter())
        return done

    def said() -> float:
        """Measured by one rank while the others wait, as `plan` measures."""
        found = 0.0
        if distributed.is_main():
            found = seconds(flops, 1, sizes, ds_config, Fleet(this_cpu(one.ranks), one.ranks)).total
        distributed.barrier()
        return distributed.broadcast_object(found)

    before = said()
    with patch.object(deepspeed.DeepSpeedEngine, "step", noted):
        pretrain(settings, ds_config)
    took = [after - one_before for one_before, after in itertools.pairwise(ends)]
    return {"predicted_s": min(before, said()), "measured_s": min(took)}


def _write(folder: Path) -> None:
    """The configuration's model and texts."""
    content = json.loads((folder / "configuration.json").read_text())
    make_base(folder / "base", content["model"])
    make_texts(folder, content["run"]["max_length"], content["run"]["train_batch_size"])


if __name__ == "__main__":
    main()
