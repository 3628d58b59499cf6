"""Span corruption: which tokens are taken out of a text, and what encoder and decoder get instead.

Raffel et al. 2020 (arXiv 1910.10683), section 3.1.4, with the numbers of their released code: so many tokens are taken
out, in so many spans, all ways to do it as likely. A span is replaced by a sentinel of its own; the decoder tells,
sentinel by sentinel, what stood there. Their code ends every text with a span unless it rolls the text at random: then
short documents would never be asked for their beginning.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Spans:
    """How much is taken out, and what stands for it."""

    density: float
    """Share of the tokens."""
    mean_length: float
    """Tokens of a span, on average."""
    sentinels: tuple[int, ...]
    """Their ids, in order of use."""
    special: tuple[int, ...] = ()
    """Tokens that are never taken out, nor counted."""

    def most(self, length: int) -> int:
        """How many spans a text of so many tokens has."""
        return self.counts(length)[1]

    def counts(self, length: int) -> tuple[int, int]:
        """Tokens taken out, and spans, of a text of so many tokens; (0, 0) of one too short for either."""
        if length < 2:
            return 0, 0
        noise = min(max(round(length * self.density), 1), length - 1)
        return noise, min(max(round(noise / self.mean_length), 1), noise, length - noise)

    def lengths(self, length: int, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Lengths of what is kept before each span, and of the spans: two int64 arrays of one size."""
        noise, spans = self.counts(length)
        kept = _segments(length - noise + 2, spans + 1, random)
        kept[0] -= 1  # a span may stand first, or last
        return kept[:-1], _segments(noise, spans, random)


def _segments(total: int, count: int, random: np.random.Generator) -> np.ndarray:
    """`total` cut into `count` lengths of one at least, each way as likely."""
    if count == 0:
        return np.empty(0, np.int64)
    cuts = np.sort(random.permutation(total - 1)[: count - 1]) + 1
    return np.diff(np.concatenate([[0], cuts, [total]])).astype(np.int64)


def corrupted(ids: np.ndarray, spans: Spans, end: int, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """What the encoder reads and the decoder tells of a text [n], both closed by the end token.

    A text of fewer than two tokens has nothing to be told: the decoder's side is empty, the encoder's the text.
    """
    text = np.flatnonzero(~np.isin(ids, spans.special))
    kept, taken = spans.lengths(len(text), random)
    if not len(taken):
        return ids, np.empty(0, np.int64)
    stays, replaced = np.ones(len(ids), bool), np.array(ids)
    told: list[np.ndarray] = []
    at = 0
    for sentinel, before, size in zip(spans.sentinels, kept, taken, strict=False):
        hole = text[at + before : at + before + size]
        told += [np.array([sentinel]), ids[hole]]
        replaced[hole[0]], stays[hole[1:]] = sentinel, False
        at += before + size
    return replaced[stays], np.concatenate([*told, [end]])
