"""Several labels per text, or pair of texts: any number of them may be right, each is told for itself.

A label is a question of yes and no, asked of its own logit: yes where that is above 0. As transformers has it for
`problem_type: multi_label_classification`: the loss is binary cross-entropy, mean over texts x labels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch.nn import functional as F

from recyclable.data.examples import Batch, LabelledTexts, TaskExamples
from recyclable.data.split import Split
from recyclable.errors import InputError
from recyclable.tasks.parts import metrics
from recyclable.tasks.parts.cells import LABELS
from recyclable.tasks.parts.columns import Column, Columns
from recyclable.tasks.parts.kind import Labels, Scores, TaskKind
from recyclable.tasks.parts.labels import class_index, class_name, class_names

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from recyclable.tasks.parts.files import Raw


class MultiLabel(TaskKind):
    """Which labels a text has: `label` is a list of their names, or a 0 or 1 for each label there is.

    Targets of a text are a 0 or 1 for each label [C]; R, the rows that losses are made of, are texts x labels.
    """

    name: ClassVar[str] = "multi_label"
    layouts: ClassVar[tuple[Columns, ...]] = (Columns(label=Column("label", "label", LABELS), rank=2),)
    problem_type: ClassVar[str | None] = "multi_label_classification"
    exclusive: ClassVar[bool] = False

    def claims(self, train: Raw) -> int:
        """Rows with lists of labels."""
        return 1

    def read(self, given: Sequence[object] | None, raws: Mapping[str, Raw]) -> tuple[Labels, dict[str, Split]]:
        """Labels in order (`tasks.parts.labels.class_names`; "0", "1" ... where rows are zeros and ones and none are
        given), and a 0 or 1 for each."""
        train = raws["train"]
        width = _width(train)
        if width is not None and (given is None or len(given) == width):
            labels = class_names(given, range(width), train.where)
            targets = {split: _zeros_and_ones(raw, width) for split, raw in raws.items()}
        else:
            for raw in raws.values():
                _require_names(raw)
            labels = class_names(given, (label for found in train.labels for label in found), train.where)
            targets = {split: _members(raw, labels, given is not None) for split, raw in raws.items()}
        return labels, {split: Split(raw.texts, raw.pairs, targets[split]) for split, raw in raws.items()}

    def moved(self, targets: list[Any], places: Sequence[int]) -> list[Any]:
        """Each 0 or 1 in the place of its label."""
        order = np.argsort(places)
        return [[found[i] for i in order] for found in targets]

    def strata(self, split: Split) -> list[int]:
        """The label of a text that is rarest in the split; one more for texts without any."""
        counts = np.sum(split.labels, axis=0)
        by_rarity = sorted(range(len(counts)), key=lambda label: (counts[label], label))
        return [next((label for label in by_rarity if found[label]), len(counts)) for found in split.labels]

    def stratum_name(self, stratum: int, labels: Labels) -> str:
        """The label's name."""
        return labels[stratum] if stratum < len(labels) else "no label"

    def examples(self, split: Split, tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> TaskExamples:
        """Texts, `labels` [B, C] (int64, 0 or 1)."""
        return LabelledTexts(split, tokenizer, max_length)

    def rows(self, values: torch.Tensor, batch: Batch) -> torch.Tensor:
        """A row of one logit per text and label [B x C, 1]."""
        return values.reshape(-1, 1)

    def targets(self, batch: Batch) -> torch.Tensor:
        """Their zeros and ones."""
        return batch["labels"].reshape(-1)

    def count(self, batch: Batch) -> int:
        """Texts x labels."""
        return batch["labels"].numel()

    def full_targets(self, rows: int, length: int, labels: int) -> Batch:
        """A 0 or 1 per text and label."""
        return {"labels": torch.zeros(rows, labels, dtype=torch.long)}

    def loss_sum(self, rows: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Binary cross-entropy of logits and as many zeros and ones, of whatever shape."""
        logits = rows.float().reshape(-1)
        return F.binary_cross_entropy_with_logits(logits, targets.reshape(-1).float(), reduction="sum")

    def divergence_sum(
        self, student: torch.Tensor, teacher: torch.Tensor, temperature: float, classes: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Sum of the KL divergences of the rows' Bernoulli distributions: yes has the logit, no has 0."""
        assert classes is None, "a teacher tells every label (`exclusive`)"
        return super().divergence_sum(_yes_and_no(student), _yes_and_no(teacher), temperature)

    def metrics(self, labels: Labels) -> tuple[str, ...]:
        """F1 over all answers, mean F1 of the labels, or the share of texts with no label wrong."""
        return "f1_micro", "f1_macro", "accuracy"

    def score(self, predictions: np.ndarray, targets: np.ndarray, labels: Labels) -> Scores:
        """f1_micro, f1_macro and accuracy of logits [N, C] (`tasks.parts.metrics.of_sets`)."""
        return metrics.of_sets(predictions, targets)

    def asked(self, targets: np.ndarray) -> np.ndarray:
        """All texts [N]."""
        return np.ones(len(targets), bool)

    def ignorance(self, train: Split, labels: Labels) -> np.ndarray:
        """Log odds of each label's frequency, a text with it and one without counted once more."""
        share = (np.sum(train.labels, axis=0) + 1) / (len(train) + 2)
        return np.log(share) - np.log1p(-share)

    def encoded(self, targets: np.ndarray) -> np.ndarray:
        """The zeros and ones of each label that occurs."""
        return targets[:, _occurring(targets)].astype(float)

    def decoded(self, fitted: np.ndarray, targets: np.ndarray, classes: int) -> np.ndarray:
        """Above 0 where what was fitted is nearer to 1 than to 0."""
        predictions = np.full((len(fitted), classes), -np.inf, fitted.dtype)
        predictions[:, _occurring(targets)] = fitted - 0.5
        return predictions


def _yes_and_no(logits: torch.Tensor) -> torch.Tensor:
    """Logits [R, 1] as those of two classes [R, 2]."""
    return F.pad(logits, (0, 1))


def _occurring(targets: np.ndarray) -> np.ndarray:
    """The labels that some text has [C]; all, where none has any."""
    found = np.asarray(targets.any(axis=0))
    return found if found.any() else ~found


def _width(train: Raw) -> int | None:
    """How many labels rows of zeros and ones are of; None for rows of names."""
    widths = {len(found) for found in train.labels}
    values = {value for found in train.labels for value in found}
    numbers = all(not isinstance(value, str) and value in (0, 1) for value in values)
    return widths.pop() if len(widths) == 1 and min(widths) > 1 and numbers else None


def _zeros_and_ones(raw: Raw, width: int) -> list[list[int]]:
    for place, found in zip(raw.places, raw.labels, strict=True):
        if len(found) != width or any(isinstance(value, str) or value not in (0, 1) for value in found):
            problem = f"labels {str(found)[:80]}, expected {width} numbers, each 0 or 1, as in the first row of train"
            raise InputError(f"{raw.where}, row {place}", problem)
    return [[int(value) for value in found] for found in raw.labels]


def _require_names(raw: Raw) -> None:
    for place, found in zip(raw.places, raw.labels, strict=True):
        row, names = f"{raw.where}, row {place}", [class_name(label) for label in found]
        wanted = "expected different names, or in every row a 0 or 1 for each label there is"
        if len(set(names)) < len(names):
            twice = next(name for i, name in enumerate(names) if name in names[:i])
            raise InputError(row, f"label {twice!r} twice in {str(found)[:80]}, {wanted}")
        if number := next((label for label in found if isinstance(label, float) and not label.is_integer()), None):
            raise InputError(row, f"label {number!r}, {wanted}")


def _members(raw: Raw, labels: Labels, named: bool) -> list[list[int]]:
    index = {name: i for i, name in enumerate(labels)}
    targets = []
    for place, found in zip(raw.places, raw.labels, strict=True):
        has = {class_index(label, index, raw, place, named) for label in found}
        targets.append([int(i in has) for i in range(len(labels))])
    return targets
