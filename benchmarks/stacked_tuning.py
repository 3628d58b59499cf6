"""Several LoRAs trained in one run (`recyclable stack`) beside as many runs of `recyclable tune`, on the CPU.

    python benchmarks/stacked_tuning.py [--quick] [--adapters N] [--pairs N] [--json]

Seeds of a LoRA on ChemProt with 16 examples a class (RECYCLABLE_DATA's models/minilm_l3 and tasks/chemprot; else, and
with --quick, both are made from the documentation strings of the installed libraries). Every run is a command of its
own, start-up included, as a user would have it. `speedup` is the time of the single runs over the stack's,
`max_rel_diff` the largest difference of any tensor of any adapter, over the tensor's largest value, and
`max_score_diff` that of any score on dev and test. `rounding_rel_diff` and `rounding_score_diff` are the same between
two runs of `tune` that differ in their number of threads alone, and so in nothing but how sums round. Weights are those
of the best step: runs that were best before the first one, all but `learned`, are left out.

The curve is of steps alone, in one process: for 1, 2, 5, 10, 20, 40 adapters and 1, 4, 16 texts of each in a step, how
many times as fast a stack's steps are as those of its adapters one after the other.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file
from tqdm import tqdm

from recyclable.api import stack, tune
from recyclable.data.docstrings import write_docstring_world
from recyclable.weights.manifest import ADAPTER, read_manifest

ROOT = Path(__file__).parents[1]
CPU = str(ROOT / "ds_configs" / "cpu_zero0.json")
ADAPTERS, PAIRS = 10, 5
CURVE_ADAPTERS, CURVE_STEPS = (1, 2, 5, 10, 20, 40), {1: 6, 4: 4, 16: 3}
"""How many adapters; texts of each in a step -> steps."""
ROUNDED = 3
"""Runs that are made with another number of threads as well."""
SETTINGS: dict[str, Any] = {
    **{"tuning": "lora", "shots": 16, "max_steps": 60, "train_batch_size": 8, "learning_rate": 5e-4},
    **{"max_length": 128, "eval_every": 60, "max_dev_examples": 50, "max_test_examples": 50, "log_every": 60},
}
OF_STACK = {"dropout": 0.0, "save_every": 0, "attn_implementation": "sdpa"}


def main() -> None:
    """Measure, print a table or one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small model, 3 adapters, few steps, one pair")
    parser.add_argument("--adapters", type=int, help="how many (default 10, --quick 3)")
    parser.add_argument("--pairs", type=int, help="of all single runs and a stack (default 5, --quick 1)")
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    arguments = parser.parse_args()
    count = arguments.adapters or (3 if arguments.quick else ADAPTERS)
    with tempfile.TemporaryDirectory() as scratch:
        figures = measure(Path(scratch), count, arguments.quick, arguments.pairs)
    print(json.dumps(figures) if arguments.json else yaml.safe_dump(figures, sort_keys=False))


def measure(out: Path, count: int, quick: bool, pairs: int | None = None) -> dict[str, Any]:
    """`{"adapters", "speedup", "max_rel_diff", ...}`, and the curve."""
    base, task = world(out, quick)
    settings = {**SETTINGS, **({"max_steps": 6, "shots": 4, "eval_every": 6} if quick else {}), "task": str(task)}
    runs = {f"seed-{seed}": {"seed": seed} for seed in range(1, count + 1)}
    took = []
    for pair in tqdm(range(pairs or (1 if quick else PAIRS)), desc="pairs", unit="pair"):
        here = out / str(pair)
        told = {"base": str(base), **OF_STACK}
        alone = sum(timed("tune", {**told, **settings, **own}, here / "alone" / name) for name, own in runs.items())
        together = timed("stack", {**told, "shared": settings, "runs": runs}, here / "together")
        took.append((alone, together))
    learned = [name for name in runs if read_manifest(here / "alone" / name).metrics["best_step"] > 0]
    if not learned:
        raise RuntimeError("no run scores better than before its first step: there are no learned weights to compare")
    rounded = learned[: 1 if quick else ROUNDED]
    for name in rounded:
        timed("tune", {**told, **settings, **runs[name]}, here / "rounded" / name, other_threads())
    found = curve(out / "curve", base, settings, quick)
    stacked = [(here / "alone" / name, here / "together" / name) for name in learned]
    twice = [(here / "alone" / name, here / "rounded" / name) for name in rounded]
    return {
        "adapters": count,
        "learned": len(learned),
        "speedup": statistics.median(alone / together for alone, together in took),
        "max_rel_diff": max(difference(*both) for both in stacked),
        "rounding_rel_diff": max(difference(*both) for both in twice),
        "max_score_diff": max(score_difference(*both) for both in stacked),
        "rounding_score_diff": max(score_difference(*both) for both in twice),
        "alone_s": statistics.median(alone for alone, _ in took),
        "together_s": statistics.median(together for _, together in took),
        "curve": found,
    }


def world(out: Path, quick: bool) -> tuple[Path, Path]:
    """A base and a task."""
    data = os.environ.get("RECYCLABLE_DATA")
    if data and not quick:
        return Path(data, "models", "minilm_l3"), Path(data, "tasks", "chemprot")
    made = write_docstring_world(out / "world")
    return made.base, made.task


def timed(verb: str, settings: dict[str, Any], out: Path, threads: int | None = None) -> float:
    """Seconds of a command, start-up included; threads: None: as many as it takes by itself."""
    file = out.with_suffix(".yaml")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump({**settings, "out": str(out)}))
    begin = time.perf_counter()
    command = [sys.executable, "-m", "recyclable.cli", verb, str(file), "--deepspeed_config", CPU]
    environment = {**os.environ, **({} if threads is None else {"OMP_NUM_THREADS": str(threads)})}
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
    return time.perf_counter() - begin


def other_threads() -> int:
    """A number of threads that is not what a run takes by itself."""
    return 1 if torch.get_num_threads() > 1 else 2


def curve(out: Path, base: Path, settings: dict[str, Any], quick: bool) -> list[dict[str, float]]:
    """Of so many adapters with so many texts in a step each: how many times as fast as one by one its steps are."""
    told: dict[str, Any] = {"base": str(base), **OF_STACK}
    rows = []
    for texts, steps in list(CURVE_STEPS.items())[: 1 if quick else None]:
        few = {"max_steps": steps, "eval_every": steps, "max_dev_examples": 2, "max_test_examples": 2}
        own = {**settings, **few, "train_batch_size": texts}
        _, *seconds = (  # the first one finds nothing warm
            tune(deepspeed_config=CPU, out=str(out / f"alone-{texts}-{number}"), **{**own, **told})["seconds"]
            for number in range(2 if quick else 4)
        )
        alone = statistics.median(seconds)
        for adapters in tqdm(CURVE_ADAPTERS[: 2 if quick else None], desc=f"curve, {texts} texts each"):
            runs = {f"seed-{seed}": {"seed": seed} for seed in range(1, adapters + 1)}
            here = str(out / f"{adapters}-{texts}")
            metrics = stack(deepspeed_config=CPU, out=here, shared=own, runs=runs, **told)
            together = max(each["seconds"] for each in metrics.values())
            rows.append({"adapters": adapters, "texts": texts, "speedup": adapters * alone / together})
    return rows


def difference(one: Path, other: Path) -> float:
    """The largest of any tensor, over the tensor's largest value."""
    first, second = (load_file(folder / ADAPTER) for folder in (one, other))
    return max(
        float((first[name] - second[name]).abs().max() / first[name].abs().max().clamp(min=1e-8)) for name in first
    )


def score_difference(one: Path, other: Path) -> float:
    """The largest of any score on dev or test."""
    first, second = (read_manifest(folder).metrics for folder in (one, other))
    return max(abs(value - second[split][name]) for split in ("dev", "test") for name, value in first[split].items())


if __name__ == "__main__":
    main()
