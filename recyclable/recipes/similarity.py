"""How alike bases work: one base beside its descendants and a control, on the same texts; numbers and a figure."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from torch import nn

from recyclable import distributed
from recyclable.analysis.similarity import Similarity, compare, plot
from recyclable.data.examples import Batch, TaskExamples
from recyclable.errors import InputError
from recyclable.models.tasks import task_model
from recyclable.tasks.parts.fewshot import limit
from recyclable.tasks.parts.task import Task, load_task
from recyclable.tasks.parts.task_data import tokenised
from recyclable.weights.base import Base
from recyclable.weights.fingerprint import tokenizer_digest
from recyclable.weights.locate import locate
from recyclable.weights.reader import Reader
from recyclable.weights.sources import fill

_SEED, _LENGTH, _BATCH = 20, 128, 16


def similarity(
    base: str, others: Mapping[str, str], task: str, *, examples: int = 300, png: Path | None = None
) -> dict[str, Similarity]:
    """Title -> how alike that base is to `base`, on the task's training texts; a collective.

    Two models are in memory at a time. A descendant's numbers mean something beside those of an unrelated control.

    Args:
        others: title -> base, of the same tokenizer, layers and heads.
        png: where the heat maps are drawn, if anywhere.
    """
    opened = {title: Base(locate(name)) for title, name in {"": base, **others}.items()}
    first = opened.pop("")
    wanted = tokenizer_digest(first)
    for other in opened.values():
        if tokenizer_digest(other) != wanted:
            raise InputError(other.folder, f"has another tokenizer than {first.folder}: no text is the same to both")
    labelled = load_task(task)
    split = limit(labelled.splits["train"], examples, _SEED)
    reader = Reader.of(first)
    texts = batches(tokenised(labelled, split, reader, min(_LENGTH, reader.limit or _LENGTH)))
    one, team = backbone(first, labelled), distributed.Ranks()
    found = {title: compare(one, backbone(other, labelled), texts, team) for title, other in opened.items()}
    if png is not None and distributed.is_main():
        plot(found, png)
    return found


def batches(texts: TaskExamples) -> list[Batch]:
    """The texts, those of like length side by side, as many at once as their attention patterns allow."""
    shares = np.array_split(np.argsort(texts.lengths, kind="stable"), -(-len(texts) // _BATCH))
    return [texts.batch([(0, int(row)) for row in rows]) for rows in shares]


def backbone(base: Base, task: Task) -> nn.Module:
    """A base as `compare` takes it, without the head for the task that it is made with."""
    model = task_model(base, task, _SEED).base_model
    model.set_attn_implementation("eager")  # the only one that tells its patterns
    return fill(model).eval().to(distributed.device())
