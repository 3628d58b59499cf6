"""What a rank tells the others of weights and gradients in an optimizer step, as often as DeepSpeed does: Ψ weights.

Rajbhandari et al. 2020, ZeRO (arXiv 1910.02054), section 7, have 2 Ψ for stages 0 to 2 and 3 Ψ for stage 3. DeepSpeed
0.19.8 keeps to it at stages 0 and 3, and sends 3 Ψ at stages 1 and 2: there an all-reduce takes the place of a
reduce-scatter unless `use_multi_rank_bucket_allreduce` is off (benchmarks/scaling.py counts the bytes).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from recyclable import machine
from recyclable.planning.states import Sizes, Zero

_GATHER_BUCKET = 5e8
"""DeepSpeed's default of `allgather_bucket_size`, elements."""


@dataclass(frozen=True)
class Said:
    """By one rank in one optimizer step."""

    gathered: float
    """Elements of weights that all-gathers make whole."""
    reduced: float
    """Elements of gradients that are added up; those of an all-reduce, which gathers them again, count twice."""
    collectives: int

    def bytes(self, size: int, ranks: int) -> float:
        """That a rank sends, and as many that it has from others, around a ring; elements have that size."""
        return size * (self.gathered + self.reduced) * (ranks - 1) / ranks


def said(sizes: Sizes, ds_config: dict[str, Any], ranks: int, micro_batches: int) -> Said:
    """What a ds_config has ranks say.

    Stage 0 adds up all gradients everywhere, stage 1 too, and then gathers the weights of which each rank stepped its
    part. Stage 2 adds gradients up after each micro-batch. Stage 3 gathers weights for each forward and each backward
    pass, once more where layers compute again, and a teacher's.

    Args:
        micro_batches: passes through the model with a backward pass each.
    """
    zero, given = Zero.of(ds_config, ranks, on_cpu=False, accumulating=False), ds_config.get("zero_optimization") or {}
    trained, taught = sum(sizes.trained.values()), sum(sizes.teacher.values())
    student = trained + sum(sizes.frozen.values())
    reductions = micro_batches if zero.stage >= 2 else 1
    twice = zero.stage == 0 or (zero.stage < 3 and given.get("use_multi_rank_bucket_allreduce", True))
    gathered, gathers = 0, 0
    if zero.stage == 3:
        gathered = micro_batches * ((3 if machine.recomputes(ds_config) else 2) * student + taught)
        large = [n for n in sizes.all().values() if n > zero.persistent]
        together = max(zero.prefetch, sum(large) / max(len(large), 1))  # tensors one by one, or ahead in buckets
        gathers = math.ceil(gathered / max(together, 1))
    elif zero.stage:
        gathered = trained
        gathers = math.ceil(gathered / given.get("allgather_bucket_size", _GATHER_BUCKET))
    reduces = reductions * math.ceil(trained / max(zero.reduce_bucket, 1))
    return Said(gathered, reductions * trained * (2 if twice else 1), gathers + reduces)
