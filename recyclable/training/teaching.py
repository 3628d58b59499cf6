"""A teacher whose answers are computed once, before training, and kept."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from recyclable import distributed, machine
from recyclable.config.settings import LearnSettings
from recyclable.data.examples import TaskExamples
from recyclable.data.order import Order
from recyclable.disks import keeper
from recyclable.objectives.teacher_cache import TaughtExamples, TeacherCache, open_cache
from recyclable.objectives.teachers import OnlineTeacher
from recyclable.training.engine import frozen
from recyclable.training.evaluation import outputs

_AT_ONCE = 1024  # examples per file: what a rank holds in memory while it fills a directory


def taught(
    examples: TaskExamples,
    make: Callable[[], OnlineTeacher],
    key: dict[str, Any],
    folder: Path | None,
    settings: LearnSettings,
    ds_config: dict[str, Any],
) -> TaughtExamples:
    """Examples that bring a teacher's answers along, those computed that the run will use; a collective.

    Args:
        make: builds the teacher, unread; it is not called when every answer is known.
        key: what tells this teacher's answers from another's.
        folder: keeps the answers for other runs; None: in memory.
    """
    order = Order(len(examples), settings.train_batch_size, settings.seed, grouping(examples, settings))
    cache = _open(folder, {**key, "precision": [machine.precision(ds_config), machine.autocast(ds_config)]})
    used, writes = order.used(settings.max_steps), distributed.is_main() if folder is None else _writes(folder)
    fill(cache, examples, used, make, settings.eval_batch_size, ds_config, writes)
    return TaughtExamples(examples, cache, used)


def grouping(examples: TaskExamples, settings: LearnSettings) -> np.ndarray | None:
    """What decides, besides the seed, which training examples share a step: their lengths, or nothing."""
    return examples.lengths if settings.group_by_length else None


def fill(
    cache: TeacherCache,
    examples: TaskExamples,
    rows: list[int],
    make: Callable[[], OnlineTeacher],
    batch_size: int,
    ds_config: dict[str, Any],
    writes: bool = True,
) -> None:
    """Have the teacher's answers for these rows in the cache; the ranks share what is missing. A collective.

    Args:
        writes: whether this rank is the one that writes them to its disk, and says what lies there.
    """
    begin = time.perf_counter()
    row_of, lengths = {examples.digest(row): row for row in rows}, examples.lengths
    _read(cache, writes)
    # Texts of like length side by side leave little to pad.
    missing = sorted(cache.missing(row_of), key=lambda digest: (lengths[row_of[digest]], digest))
    if missing:
        quiet = not (distributed.is_main() and sys.stderr.isatty())
        with (
            frozen(make(), ds_config) as (answers, device),
            tqdm(total=len(missing), desc="teacher", unit="example", disable=quiet) as bar,
        ):
            for start in range(0, len(missing), _AT_ONCE):
                part = missing[start : start + _AT_ONCE]
                chosen = np.array([row_of[digest] for digest in part])
                told = outputs(answers, examples, chosen, batch_size, device)
                cache.keep(part, {name: tensor.cpu() for name, tensor in told.items()}, writes)
                bar.update(len(part))
        distributed.barrier()
        _read(cache, writes)
    known, seconds = len(row_of) - len(missing), time.perf_counter() - begin
    distributed.say(f"teacher: {len(missing)} answers computed, {known} known, {seconds:.1f} s")


def _open(root: Path | None, key: dict[str, Any]) -> TeacherCache:
    if root is None:
        return TeacherCache(None)
    with distributed.main_first():
        cache, stale = open_cache(root, key)
        if stale:
            distributed.say(f"notice: {stale}")
    return cache


def _writes(folder: Path) -> bool:
    """Whether this rank keeps the answers: one does on each disk."""
    return keeper(folder) == distributed.rank()


def _read(cache: TeacherCache, writes: bool) -> None:
    """All ranks read the files that are whole on every disk, so that all know the same examples."""
    found = [each for each in distributed.Ranks().gather(cache.files() if writes else None) if each is not None]
    for path in (path for _, damaged in found for path in damaged):
        distributed.say(f"notice: {path} is damaged (its SHA-256 is not its name); its answers are computed again")
    cache.read(sorted(set.intersection(*(set(whole) for whole, _ in found))))
