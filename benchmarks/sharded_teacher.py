"""Memory over time with a teacher that ZeRO-3 partitions: a leak would show as a slope.

    python benchmarks/sharded_teacher.py [--quick] [--json]

A student and its frozen teacher in one module, partitioned over two ranks, nothing kept whole (persistence threshold
and max live parameters 0): steps as `recyclable recycle` runs them with `teacher: online`, after a warm-up.
`mb_per_100_steps` is the slope of a straight line (least squares) through a rank's anonymous memory in use, every tenth
step, in 10^6 bytes per 100 steps; of the two ranks the larger. In use: batches differ in length, and what the allocator
keeps of freed memory goes up and down by tens of MB; it is given back before each look. Model and task: few_shot.py's;
--quick takes the smaller ones that are made here. Linux with glibc only.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import few_shot
import numpy as np
from memory import used_bytes

RANKS, WARM_UP, STEPS, EVERY = 2, 50, 200, 10
DS_CONFIG = {
    "zero_optimization": {
        "stage": 3,
        "overlap_comm": False,
        "stage3_param_persistence_threshold": 0,
        "stage3_max_live_parameters": 0,
        "stage3_prefetch_bucket_size": 0,
    }
}


def measure(quick: bool) -> dict[str, float]:
    """`mb_per_100_steps`; where each rank began and ended is reported on stderr."""
    from recyclable.launching.supervisor import launch

    slopes = []
    with tempfile.TemporaryDirectory() as folder:
        # Made before there are ranks: of several, transformers saves on one alone.
        world = map(str, few_shot.base_and_task(Path(folder), made_here=quick))
        if launch(__file__, ["--rank", folder, *world], nproc=RANKS):
            raise RuntimeError("a rank failed")
        for rank in range(RANKS):
            held = np.array(json.loads(Path(folder, f"{rank}.json").read_text())) / 1e6
            slopes.append(100 / EVERY * np.polyfit(np.arange(len(held)), held, 1)[0])
            print(f"sharded teacher, rank {rank}: {held[0]:.1f} MB, {held[-1]:.1f} MB after {STEPS}", file=sys.stderr)
    return {"mb_per_100_steps": float(max(slopes))}


def one_rank(folder: Path, base: Path, task: Path) -> None:
    """Train, and write down the bytes in use after every few steps once warm."""
    from recyclable import distributed
    from recyclable.objectives.teachers import OnlineTeacher
    from recyclable.training.engine import engine_for
    from recyclable.training.feeding import StepBatches
    from recyclable.training.loop import train_step

    distributed.init()
    held = []
    given = few_shot.setting(WARM_UP + STEPS, folder, base, task)
    objective = given.objective(given.student(), OnlineTeacher(given.teacher(), given.task.kind))
    with engine_for(objective, given.config, DS_CONFIG, given.config.out) as engine:
        made = StepBatches(given.examples, given.order, objective, engine.train_micro_batch_size_per_gpu())
        for number in range(WARM_UP + STEPS):
            train_step(engine, objective, made[number], number, given.config)
            if number >= WARM_UP and number % EVERY == 0:
                held.append(used_bytes())
    Path(folder, f"{distributed.rank()}.json").write_text(json.dumps(held))
    distributed.shutdown()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        one_rank(*map(Path, sys.argv[2:5]))
    else:
        few_shot.main(measure, __doc__)
