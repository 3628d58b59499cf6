"""A teacher whose answers are computed once, before a recycling run, and kept."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from torch import nn
from tqdm import tqdm

from recyclable import machine
from recyclable.config import RecycleConfig
from recyclable.data.examples import LabelledTexts
from recyclable.data.order import Order
from recyclable.objectives.teacher_cache import TaughtExamples, TeacherCache, open_folder
from recyclable.objectives.teachers import CachedTeacher, OnlineTeacher, Teacher
from recyclable.recipes.adapting import Student, grouping
from recyclable.training import distributed
from recyclable.training.engine import frozen
from recyclable.training.evaluation import outputs
from recyclable.weights.adapted import AdaptedWeights

_AT_ONCE = 1024  # examples per file: what a rank holds in memory while it fills a directory


def teach(
    student: Student,
    weights: AdaptedWeights,
    make: Callable[[], nn.Module],
    config: RecycleConfig,
    ds_config: dict[str, Any],
) -> tuple[Teacher, Student]:
    """A teacher that has answered already, and the student with examples that bring its answers; a collective.

    Args:
        weights: what tells this teacher's answers from another's, together with the base they belong to.
        make: builds the teacher's model; it is not called when every answer is known.
    """
    examples = student.data.train
    order = Order(len(examples), config.train_batch_size, config.seed, grouping(config, student.data))
    cache = _open(config, weights, ds_config)
    fill(cache, examples, order.used(config.max_steps), make, config, ds_config)
    return CachedTeacher(), replace(student, data=replace(student.data, train=TaughtExamples(examples, cache)))


def fill(
    cache: TeacherCache,
    examples: LabelledTexts,
    rows: list[int],
    make: Callable[[], nn.Module],
    config: RecycleConfig,
    ds_config: dict[str, Any],
) -> None:
    """Have the teacher's answers for these rows in the cache; the ranks share what is missing. A collective."""
    begin = time.perf_counter()
    row_of, lengths = {examples.digest(row): row for row in rows}, examples.lengths
    _read(cache)
    # Texts of like length side by side leave little to pad.
    missing = sorted(cache.missing(row_of), key=lambda digest: (lengths[row_of[digest]], digest))
    if missing:
        teacher = OnlineTeacher(make(), config.teacher_top_k)
        quiet = not (distributed.is_main() and sys.stderr.isatty())
        with (
            frozen(teacher, config, ds_config) as (answers, device),
            tqdm(total=len(missing), desc="teacher", unit="example", disable=quiet) as bar,
        ):
            for start in range(0, len(missing), _AT_ONCE):
                part = missing[start : start + _AT_ONCE]
                chosen = np.array([row_of[digest] for digest in part])
                told = outputs(answers, examples, chosen, config.eval_batch_size, device)
                cache.keep(part, {name: tensor.cpu() for name, tensor in told.items()}, distributed.is_main())
                bar.update(len(part))
        distributed.barrier()
        _read(cache)
    if distributed.is_main():
        known, seconds = len(row_of) - len(missing), time.perf_counter() - begin
        print(f"teacher: {len(missing)} answers computed, {known} known, {seconds:.1f} s", flush=True)


def _open(config: RecycleConfig, weights: AdaptedWeights, ds_config: dict[str, Any]) -> TeacherCache:
    if config.teacher_cache is None:
        return TeacherCache(None)
    key = {
        "weights": weights.manifest.files,
        "base": weights.manifest.base["fingerprint"],
        "tuning": weights.manifest.tuning,
        "top_k": config.teacher_top_k,
        "precision": [machine.precision(ds_config), machine.autocast(ds_config)],
    }
    with distributed.main_first():
        folder, stale = open_folder(config.teacher_cache, key)
        if stale and distributed.is_main():
            print(f"notice: {stale}", flush=True)
    return TeacherCache(folder)


def _read(cache: TeacherCache) -> None:
    """All ranks read the files that rank 0 found whole, so that all know the same examples."""
    found = cache.files() if distributed.is_main() else None
    whole, damaged = distributed.broadcast_object(found)
    for path in damaged if distributed.is_main() else ():
        print(f"notice: {path} is damaged (its SHA-256 is not its name); its answers are computed again", flush=True)
    cache.read(whole)
