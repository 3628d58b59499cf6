"""New word pieces: the runs of present pieces that, made one, save most pieces of the text.

WordPiece takes the longest piece that fits, from the left, and needs no smaller ones on the way: so whole words and
long endings are learned at once, as those do it who add words of a domain to BERT's vocabulary. A text whose splitting
takes no new piece takes the same old ones: at every step the longest that fits is still an old one.
"""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping

from recyclable.data.growing.words import LONGEST

_CONSIDERED = 30  # runs looked at for each that is wanted: those that save most on their own
_LEAST = 2  # times that a run must have come


def saving(
    words: Mapping[tuple[int, ...], int], pieces: Mapping[int, str], number: int, inside: str, known: Collection[str]
) -> dict[str, tuple[int, ...]]:
    """At most `number` new pieces -> the ids of the old ones each is made of, by what they save; ties by ids.

    What a run saves is counted anew after each choice: words that it shares with one chosen before count no more. The
    greedy choice is the best possible but for a factor of 1 - 1/e, as for every such sum (Nemhauser et al. 1978).

    Args:
        words: ids of a word's pieces -> how often it came.
        pieces: id -> text of the old pieces.
        inside: what a piece begins with that is not the first of its word (`##`).
        known: what no new piece may be called.
    """
    chosen: dict[str, tuple[int, ...]] = {}
    several = _Words(words)
    heap = [(-saved, run) for run, saved in several.best(_CONSIDERED * number).items()]
    heapq.heapify(heap)
    while heap and len(chosen) < number:
        _, run = heapq.heappop(heap)
        saved = several.saved(run)
        if heap and (-saved, run) > heap[0]:  # others may save more by now
            if saved > 0:
                heapq.heappush(heap, (-saved, run))
            continue
        text = pieces[run[0]] + "".join(pieces[row].removeprefix(inside) for row in run[1:])
        if saved > 0 and len(text) <= LONGEST and text not in known and text not in chosen:
            chosen[text] = run
            several.join(run)
    return chosen


class _Words:
    """Words of several pieces, some of which have been joined."""

    def __init__(self, words: Mapping[tuple[int, ...], int]) -> None:
        found = sorted((word, count) for word, count in words.items() if len(word) > 1)
        self._words, self._times = [word for word, _ in found], [count for _, count in found]
        self._seams = [set(range(len(word) + 1)) for word in self._words]
        self._where: defaultdict[tuple[int, ...], list[tuple[int, int]]] = defaultdict(list)

    def best(self, most: int) -> dict[tuple[int, ...], int]:
        """The runs that save most on their own, and what each saves."""
        counts: Counter[tuple[int, ...]] = Counter()
        for word, times in zip(self._words, self._times, strict=True):
            for start in range(len(word) - 1):
                for stop in range(start + 2, len(word) + 1):
                    counts[word[start:stop]] += times
        saved = {run: count * (len(run) - 1) for run, count in counts.items() if count >= _LEAST}
        best = dict(heapq.nsmallest(most, saved.items(), key=lambda item: (-item[1], item[0])))
        for place, word in enumerate(self._words):
            for start in range(len(word) - 1):
                for stop in range(start + 2, len(word) + 1):
                    if word[start:stop] in best:
                        self._where[word[start:stop]].append((place, start))
        return best

    def saved(self, run: tuple[int, ...]) -> int:
        """How many pieces of the text it would save now."""
        return sum(
            self._times[place] * (len(inner) - 1)
            for place, start in self._where[run]
            if (inner := self._inner(place, start, start + len(run)))
        )

    def join(self, run: tuple[int, ...]) -> None:
        """Make every such run one piece."""
        for place, start in self._where[run]:
            if self._inner(place, start, start + len(run)):
                self._seams[place] -= set(range(start + 1, start + len(run)))

    def _inner(self, place: int, start: int, stop: int) -> list[int]:
        """Where pieces begin that such a run is made of now; none where it begins or ends within one."""
        seams = self._seams[place]
        return [at for at in range(start, stop) if at in seams] if {start, stop} <= seams else []
