"""Byte-pair encoding continued: the most frequent pairs of present pieces become pieces, one after the other.

Sennrich et al. 2016 (arXiv 1508.07909), begun where the present merges end. Old merges go first and a new merge only
ever makes a new piece: a text in which no new piece comes up is split as before.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping
from itertools import pairwise
from typing import NamedTuple

from recyclable.data.growing.words import LONGEST

_LEAST = 2  # times that a pair must have come


class Merged(NamedTuple):
    """What was learned, in this order."""

    pieces: list[str]
    parts: list[tuple[int, ...]]
    """Of each piece, the ids of the old pieces it is made of."""
    merges: list[tuple[str, str]]
    """The pairs that make them; a piece may be made in several ways."""


def continued(
    words: Mapping[tuple[int, ...], int], pieces: Mapping[int, str], number: int, by_text: bool, known: Collection[str]
) -> Merged:
    """At most `number` new pieces; fewer where no pair comes twice any more. Ties go to the lowest ids.

    Args:
        words: ids of a word's pieces -> how often it came.
        pieces: id -> text of the old pieces.
        by_text: whether two pieces merge whenever their text is a piece, as SentencePiece has it, and not by a list of
            pairs; then pieces that would make an old one in a new way are left out as well.
        known: what no new piece may be called.
    """
    spelled = dict(pieces)
    parts: dict[int, tuple[int, ...]] = {row: (row,) for row in pieces}
    taken, opened = set(pieces.values()) | set(known), _Halves(pieces.values()) if by_text else None
    row_of: dict[str, int] = {}
    beyond = 1 + max(pieces)
    merges: list[tuple[str, str]] = []
    counted = _Pairs(words)
    while len(row_of) < number and (pair := counted.pop()) is not None:
        text = spelled[pair[0]] + spelled[pair[1]]
        fits = len(text) <= LONGEST and text not in taken
        if not fits or (text not in row_of and opened is not None and opened.halve(text, row_of)):
            continue
        if text not in row_of:
            row_of[text] = row = beyond + len(row_of)
            spelled[row], parts[row] = text, parts[pair[0]] + parts[pair[1]]
        merges.append((spelled[pair[0]], spelled[pair[1]]))
        counted.merge(pair, row_of[text])
    return Merged(list(row_of), [parts[row] for row in row_of.values()], merges)


def splits(pieces: list[str], known: Collection[str]) -> list[tuple[str, str]]:
    """Every pair of pieces that makes one of the new ones: by text as SentencePiece merges, written as a list.

    Args:
        pieces: the new ones, in order.
        known: the old ones.
    """
    every = {*known, *pieces}
    halves = ((piece[:at], piece[at:]) for piece in pieces for at in range(1, len(piece)))
    return [pair for pair in halves if every.issuperset(pair)]


class _Pairs:
    """How often each pair of neighbours comes, kept up to date as pairs are merged."""

    def __init__(self, words: Mapping[tuple[int, ...], int]) -> None:
        several = sorted((word, count) for word, count in words.items() if len(word) > 1)
        self._words, self._times = [list(word) for word, _ in several], [count for _, count in several]
        self._count: Counter[tuple[int, int]] = Counter()
        self._where: defaultdict[tuple[int, int], set[int]] = defaultdict(set)
        for place, word in enumerate(self._words):
            self._add(place, word, 1)
        self._heap = [(-count, pair) for pair, count in self._count.items() if count >= _LEAST]
        heapq.heapify(self._heap)

    def pop(self) -> tuple[int, int] | None:
        """The most frequent pair, which is not asked for again unless its number changes; None for none."""
        while self._heap:
            count, pair = heapq.heappop(self._heap)
            if -count == self._count[pair]:  # else it has changed since
                return pair
        return None

    def merge(self, pair: tuple[int, int], row: int) -> None:
        """Make every such pair one piece."""
        changed: set[tuple[int, int]] = set()
        for place in self._where.pop(pair):
            word = self._words[place]
            changed |= self._add(place, word, -1)
            merged, at = [], 0
            while at < len(word):
                here = at + 1 < len(word) and (word[at], word[at + 1]) == pair
                merged.append(row if here else word[at])
                at += 2 if here else 1
            self._words[place] = merged
            changed |= self._add(place, merged, 1)
        for each in changed:
            if self._count[each] >= _LEAST:
                heapq.heappush(self._heap, (-self._count[each], each))

    def _add(self, place: int, word: list[int], sign: int) -> set[tuple[int, int]]:
        pairs = list(pairwise(word))
        for pair in pairs:
            self._count[pair] += sign * self._times[place]
            if sign > 0:
                self._where[pair].add(place)
        return set(pairs)


class _Halves:
    """Finds old pieces that begin or end with a text."""

    def __init__(self, pieces: Collection[str]) -> None:
        self._pieces = set(pieces)
        self._sorted, self._reversed = sorted(pieces), sorted(piece[::-1] for piece in pieces)

    def halve(self, text: str, new: Collection[str]) -> bool:
        """Whether some old piece is this text and another piece, old or new."""
        rests = _after(self._sorted, text)
        rests += [rest[::-1] for rest in _after(self._reversed, text[::-1])]
        return any(rest in self._pieces or rest in new for rest in rests)


def _after(ordered: list[str], begin: str) -> list[str]:
    """What follows where one of these begins so."""
    found = []
    for place in range(bisect_left(ordered, begin), len(ordered)):
        if not ordered[place].startswith(begin):
            break
        if len(ordered[place]) > len(begin):
            found.append(ordered[place][len(begin) :])
    return found
