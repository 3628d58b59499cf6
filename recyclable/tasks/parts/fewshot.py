"""Few-shot samples and limits: fixed by seed and content, the same on every machine and with every library version."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence

from recyclable.data.split import Split
from recyclable.errors import InputError


def k_shot(split: Split, k: int, seed: int, strata: Sequence[int]) -> tuple[Split, dict[int, int]]:
    """Draw k examples per stratum, kept in the order of the split.

    Each stratum is drawn for itself, from seed, its number and the order of its own examples: examples added to one do
    not change what is drawn from another, and the draw for a smaller k is part of that for a larger one.

    Args:
        strata: the stratum of each example (`TaskKind.strata`): its class; in regression all are in one.

    Returns:
        the sample, and {stratum: examples it has} for each with fewer than k, all of which are taken. One without any
        example is not known here and not listed.

    Raises:
        InputError: k < 1.
    """
    if k < 1:
        raise InputError("k", f"{k} examples per class, expected at least 1")
    groups: dict[int, list[int]] = defaultdict(list)
    for position, stratum in enumerate(strata):
        groups[stratum].append(position)
    chosen = [group[i] for stratum, group in groups.items() for i in _draw(len(group), k, f"{seed} {stratum}")]
    short = {stratum: len(group) for stratum, group in sorted(groups.items()) if len(group) < k}
    return split.take(sorted(chosen)), short


def limit(split: Split, n: int, seed: int) -> Split:
    """A fixed random subset of at most n examples, kept in the order of the split; raises InputError if n < 1."""
    if n < 1:
        raise InputError("limit", f"{n} examples, expected at least 1")
    return split.take(sorted(_draw(len(split), n, f"limit {seed}")))


def _draw(size: int, n: int, key: str) -> list[int]:
    """The n positions of range(size) whose hash is lowest: unlike a generator's stream, defined for good."""

    def rank(position: int) -> bytes:
        return hashlib.sha256(f"{key} {position}".encode()).digest()

    return sorted(range(size), key=rank)[:n]
