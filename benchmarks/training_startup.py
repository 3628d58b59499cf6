"""Seconds from a command, `recyclable pretrain` on a small model, to its first training step; nothing is packed yet."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import yaml
from tqdm import tqdm

from recyclable.data.docstrings import write_docstring_world

_SETTINGS = {"max_length": 64, "max_steps": 1, "train_batch_size": 16, "learning_rate": 1e-3, "log_every": 1}


def first_steps(scratch: Path, pairs: int) -> dict[str, float]:
    """Median seconds, "1 rank" and "2 ranks"."""
    made = write_docstring_world(scratch / "world")
    corpus = {"train": str(made.general / "train.jsonl"), "heldout": str(made.general / "heldout.jsonl")}
    settings = {**_SETTINGS, "base": str(made.base), "corpus": corpus, "save_every": 0, "max_heldout_sequences": 64}
    (scratch / "run.yaml").write_text(yaml.safe_dump({**settings, "out": str(scratch / "out")}))
    found: dict[str, list[float]] = {"1 rank": [], "2 ranks": []}
    for number in tqdm(range(pairs), desc="start-up", unit="pair"):
        for name, took in found.items():
            took.append(first_step(scratch, scratch / f"{number}-{name[0]}", int(name[0])))
    return {name: statistics.median(took) for name, took in found.items()}


def first_step(scratch: Path, out: Path, ranks: int) -> float:
    """Seconds until the line that tells of step 1's loss; the run's start, text and first evaluation come before it."""
    command = [sys.executable, "-m", "recyclable.cli", "pretrain", str(scratch / "run.yaml"), "--out", str(out)]
    command += ["--deepspeed_config", "cpu_zero1", "--nproc", str(ranks)]
    environment = {**os.environ, "HF_DATASETS_CACHE": str(out.with_name(f"{out.name}-cache"))}
    begin, lines = time.perf_counter(), []
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as run:
        for line in run.stdout or ():
            lines.append(line)
            if "step 1/1  loss" in line and "tokens/s" in line:
                took = time.perf_counter() - begin
                run.communicate()
                return took
    raise RuntimeError(f"no first step was told of:\n{''.join(lines)}")
