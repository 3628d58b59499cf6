"""Choice: which of a row's own options goes on from its prompt, told by how likely a language model finds each.

As lm-eval asks tasks of multiple choice: the option of the largest summed log-likelihood, plain or per character. Only
the right option is trained on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch

from recyclable.data.bad_rows import BadRow
from recyclable.data.examples import Batch, TaskExamples
from recyclable.data.split import Split
from recyclable.tasks.parts.cells import LABEL, OPTIONS, Choices
from recyclable.tasks.parts.columns import Column, Columns
from recyclable.tasks.parts.kind import Labels, Scores
from recyclable.tasks.parts.labels import class_name, number
from recyclable.tasks.parts.options import LENGTHS, ROWS, Options
from recyclable.tasks.parts.text_answers import TextAnswers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from recyclable.tasks.parts.files import Raw

_KIND = "no right option"
_CHOICES, _ANSWER = Column("choices", "choices", OPTIONS), Column("answer", "answer", LABEL)


class Choice(TextAnswers):
    """Which of a row's options goes on from its prompt.

    O: the most options that a row of the split has.
    """

    name: ClassVar[str] = "choice"
    layouts: ClassVar[tuple[Columns, ...]] = (
        Columns(Column("prompt", "prompt"), _CHOICES, _ANSWER, rank=2),
        Columns(Column("prompt", "question"), _CHOICES, _ANSWER, rank=2),
    )

    def read(self, given: Sequence[object] | None, raws: Mapping[str, Raw]) -> tuple[Labels, dict[str, Split]]:
        """No labels; prompts, the texts of their options, and the index of the right one."""
        return (), {name: self._split(raw) for name, raw in raws.items()}

    def require_row(self, raw: Raw, at: int) -> None:
        """One option is the right one."""
        _right(raw, at)

    def _split(self, raw: Raw) -> Split:
        choices: list[Choices] = raw.pairs or []
        answers = [_right(raw, at) for at in range(len(choices))]
        return Split(raw.texts, [one.texts for one in choices], answers, raw.where, raw.places)

    def examples(self, split: Split, tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> Options:
        """Options in tokens, each behind its prompt."""
        return Options(split, tokenizer, max_length)

    def answers(self, logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Of each option its log-likelihood and its characters [B, O, 2], from [rows, 2]; -inf, 1 where there is none.

        A batch of right options alone [B, 2] is left as it is.
        """
        if ROWS not in batch:
            return logits
        rows, there = batch[ROWS], batch[ROWS] >= 0
        likely = torch.where(there, logits[rows.clamp(min=0), 0], -torch.inf)
        return torch.stack([likely, batch[LENGTHS].to(likely.dtype)], dim=-1)

    def metrics(self, labels: Labels) -> tuple[str, ...]:
        """Accuracy, plain or with log-likelihoods per character."""
        return "accuracy", "accuracy_norm"

    def score(self, predictions: np.ndarray, targets: np.ndarray, labels: Labels) -> Scores:
        """accuracy and accuracy_norm of [N, O, 2]; a row with a NaN counts as wrong."""
        likely, lengths = predictions[..., 0].astype(np.float64), predictions[..., 1]
        broken = np.isnan(likely).any(axis=1)

        def accuracy(values: np.ndarray) -> float:
            return float(((np.where(np.isnan(values), -np.inf, values).argmax(axis=1) == targets) & ~broken).mean())

        return {"accuracy": accuracy(likely), "accuracy_norm": accuracy(likely / lengths)}

    def knowing_nothing(self, train: Split, examples: TaskExamples, labels: Labels) -> Scores:
        """To whom every option is as likely."""
        assert isinstance(examples, Options)
        options = np.array([len(of) for of in examples.choices], np.float64)
        right = float((1 / options).mean())
        return {"loss": float(np.log(options).mean()), "accuracy": right, "accuracy_norm": right}

    def mean_loss(self, predictions: np.ndarray, targets: np.ndarray) -> float:
        """Mean negative log-likelihood of a right option among its row's, as if one of them had to be said."""
        likely = torch.from_numpy(np.ascontiguousarray(predictions[..., 0]))
        return float(self.loss_sum(likely, torch.from_numpy(targets))) / max(1, len(targets))


def _right(raw: Raw, at: int) -> int:
    """The index of a row's right option, from its label, its very text or its index; BadRow where none is."""
    assert raw.pairs is not None, "the options"
    answer, (texts, labels) = raw.labels[at], raw.pairs[at]
    name, names = class_name(answer), raw.declared if labels is None else labels
    if names is not None and name in names:
        found = list(names).index(name)
    elif isinstance(answer, str) and answer in texts:
        if texts.count(answer) > 1:
            raise BadRow(raw.place(at), f"answer {answer!r} is the text of several options, expected an index", _KIND)
        found = texts.index(answer)
    else:
        told = None if isinstance(answer, bool) else number(answer)
        found = int(told) if told is not None and told.is_integer() else -1
    if not 0 <= found < len(texts):
        labelled = f"a label of {', '.join(names)}, " if names is not None else ""
        wanted = f"{labelled}the very text of an option, or an index from 0 to {len(texts) - 1}"
        raise BadRow(raw.place(at), f"answer {answer!r}, expected {wanted}", _KIND)
    return found
