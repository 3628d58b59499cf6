"""Scores are the same on one process and on ranks that share the examples, the model partitioned over them or not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from processes import ROOT
from worlds import make_adapter, make_base, make_outdated, make_task, make_upgraded

ZERO3 = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": 0}}


def evaluated(folder: Path, *argv: object) -> list[dict]:
    """What `evaluate --json` prints about weights of two kinds."""
    names = ("--weights", "delta", "adapter", "--base", "new", "--old-base", "base", "--task", "task")
    code = "import sys; from recyclable.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "evaluate", *names, "--json", *map(str, argv)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))["runs"]


@pytest.mark.parametrize("stage", [0, 3])
def test_two_ranks_give_the_scores_of_one(tmp_path: Path, stage: int) -> None:
    base = make_base(tmp_path / "base")
    make_upgraded(base, tmp_path / "new")
    task = make_task(tmp_path / "task", test=33)
    make_outdated(base, task, tmp_path / "delta")
    make_adapter(base, task, tmp_path / "adapter", "lora")
    (tmp_path / "zero.json").write_text(json.dumps(ZERO3 if stage else {"zero_optimization": {"stage": 0}}))
    alone = evaluated(tmp_path)
    assert len({row["test_accuracy"] for row in alone}) > 1  # the two kinds of weights do not score alike
    assert evaluated(tmp_path, "--nproc", 2, "--deepspeed_config", "zero.json") == alone
