"""Few-shot samples and limits: fixed by seed and content, the same on every machine and with every library version."""

from __future__ import annotations

import hashlib
from collections import defaultdict

from recyclable.data.tasks import Problem, Split
from recyclable.errors import InputError


def k_shot(split: Split, k: int, seed: int, problem: Problem = "classification") -> tuple[Split, dict[int, int]]:
    """Draw k examples per class (in regression: k examples in all), kept in the order of the split.

    Each class is drawn for itself, from seed, class index and the order of its own examples: examples added to one
    class do not change what is drawn from another, and the draw for a smaller k is part of that for a larger one.

    Returns:
        the sample, and {class index: examples it has} for each class with fewer than k, all of which are taken
        (regression has the one "class" 0). A class without any example is not known here and not listed.

    Raises:
        InputError: k < 1.
    """
    if k < 1:
        raise InputError("k", f"{k} examples per class, expected at least 1")
    groups: dict[int, list[int]] = defaultdict(list)
    for position, label in enumerate(split.labels):
        groups[0 if problem == "regression" else int(label)].append(position)
    chosen = [group[i] for label, group in groups.items() for i in _draw(len(group), k, f"{seed} {label}")]
    short = {label: len(group) for label, group in sorted(groups.items()) if len(group) < k}
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
