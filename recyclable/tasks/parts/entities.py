"""Entities in sequences of tags: IOB1, IOB2 and IOBES are read, whole entities are scored by nervaluate."""

from __future__ import annotations

import re
from collections.abc import Iterable

OUTSIDE = "O"
_TAG = re.compile(r"([BIESLU])-(.+)")


def has_entities(labels: Iterable[str]) -> bool:
    """Whether tags are of entities: O, and B-, I- ... of a type."""
    labels = list(labels)
    return OUTSIDE in labels and all(label == OUTSIDE or _TAG.fullmatch(label) for label in labels) and len(labels) > 1


def iob2(tags: list[str]) -> list[str]:
    """The same entities as B-, I- and O: one begins wherever its tag cannot go on with the one before (conlleval)."""
    found: list[str] = []
    before = OUTSIDE
    for tag in tags:
        if (match := _TAG.fullmatch(tag)) is None:
            found.append(OUTSIDE)
        else:
            goes_on = match[1] in "IEL" and before != OUTSIDE and before[2:] == match[2] and before[0] in "BI"
            found.append(f"{'I' if goes_on else 'B'}-{match[2]}")
        before = tag
    return found


def entity_f1(wanted: list[list[str]], found: list[list[str]]) -> dict[str, float]:
    """precision, recall and f1 of entities, micro-averaged: right where type and both ends are; 0 where there is none.

    Args:
        wanted, found: the tags of each text.
    """
    # Its Evaluator would score every type by itself, and in three other ways besides: ten times the work.
    from nervaluate.entities import EvaluationResult
    from nervaluate.loaders import ListLoader
    from nervaluate.strategies import StrictEvaluation

    both = (ListLoader().load([iob2(tags) for tags in of]) for of in (wanted, found))
    texts = [StrictEvaluation().evaluate(*pair, tags=[])[0] for pair in zip(*both, strict=True)]
    counted = ("correct", "incorrect", "missed", "spurious")
    total = EvaluationResult(**{name: sum(getattr(text, name) for text in texts) for name in counted})
    total.compute_metrics()
    return {name: float(getattr(total, name)) for name in ("precision", "recall", "f1")}
