"""Tokens: a tag per word (named entities, parts of speech), told from the word's first piece.

CoNLL-2003 (Tjong Kim Sang & De Meulder, arXiv cs/0306050): entities are spans, one is right where type and both ends
are. Rows have the columns "tokens", a list of words, and "tags", a list of as many tags.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from torch.nn import functional as F

from recyclable.data.bad_rows import BadRow
from recyclable.data.examples import Batch, LabelledTexts, TaskExamples
from recyclable.data.split import Split
from recyclable.errors import InputError
from recyclable.tasks.parts import metrics
from recyclable.tasks.parts.cells import LABELS, WORDS
from recyclable.tasks.parts.columns import Column, Columns
from recyclable.tasks.parts.entities import OUTSIDE, entity_f1, has_entities
from recyclable.tasks.parts.kind import Labels, Scores, TaskKind, of_text
from recyclable.tasks.parts.labels import class_index, class_names

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from recyclable.data.order import Item
    from recyclable.tasks.parts.files import Raw

NOTHING, CUT = -100, -1000
"""Targets that are no tags: there is no such word; CUT - tag: the word lies beyond max_length."""
POSITIONS = "words.positions"
"""Each word's first piece, by its place in the sequence [B, W]; 0 where there is none."""


class Tokens(TaskKind):
    """What each word of a text is: a list of words in column `tokens` and of as many tags in `tags`.

    W: the most words that any text of the split has.
    """

    name: ClassVar[str] = "tokens"
    layouts: ClassVar[tuple[Columns, ...]] = (
        Columns(Column("text", "tokens", WORDS), None, Column("label", "tags", LABELS), rank=1),
    )
    model_class: ClassVar[str] = "TokenClassification"
    task_type: ClassVar[str] = "TOKEN_CLS"

    def claims(self, train: Raw) -> int:
        """Rows with lists of words."""
        return 3

    def read(self, given: Sequence[object] | None, raws: Mapping[str, Raw]) -> tuple[Labels, dict[str, Split]]:
        """Tags in order (O first, then as `tasks.parts.labels.class_names` sorts), and their indices."""
        train = raws["train"]
        labels = class_names(given, (tag for tags in train.labels for tag in tags), train.where)
        if given is None and OUTSIDE in labels:
            labels = (OUTSIDE, *(label for label in labels if label != OUTSIDE))
        index = {name: i for i, name in enumerate(labels)}
        splits = {}
        for split, raw in raws.items():
            rows = zip(raw.places, raw.labels, strict=True)
            targets = [[class_index(tag, index, raw, place, given is not None) for tag in tags] for place, tags in rows]
            splits[split] = Split(raw.texts, None, targets)
        return labels, splits

    def require_row(self, raw: Raw, at: int) -> None:
        """A word at least, and a tag for each."""
        words, tags = len(raw.texts[at]), len(raw.labels[at])
        if words != tags or not words:
            problem = f"{words} words and {tags} tags, expected as many, at least one"
            raise BadRow(raw.place(at), problem, "words and tags do not pair")

    def strata(self, split: Split) -> list[int]:
        """The tag of a text that is rarest in the split: few-shot samples then have some of every tag."""
        counts = Counter(tag for tags in split.labels for tag in tags)
        return [min(tags, key=lambda tag: (counts[tag], tag)) for tags in split.labels]

    def stratum_name(self, stratum: int, labels: Labels) -> str:
        """The tag."""
        return labels[stratum]

    def examples(self, split: Split, tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> TaskExamples:
        """Words in pieces, `labels` [B, W] (int64)."""
        return TaggedWords(split, tokenizer, max_length)

    def answers(self, logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Logits [B, L, C] of each word's first piece [B, W, C]; where nobody says which these are, of every piece."""
        logits = of_text(logits, batch)
        if (positions_BW := batch.get(POSITIONS)) is None:
            return logits
        return logits.gather(1, positions_BW[..., None].expand(-1, -1, logits.shape[-1]))

    def rows(self, values: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Those of the words that are seen; without labels, of all pieces."""
        return values[batch["labels"] >= 0 if "labels" in batch else batch["attention_mask"].bool()]

    def targets(self, batch: Batch) -> torch.Tensor:
        """Their tags."""
        return batch["labels"][batch["labels"] >= 0]

    def count(self, batch: Batch) -> int:
        """How many they are."""
        return int((batch["labels"] >= 0).sum())

    def full_targets(self, rows: int, length: int, labels: int) -> Batch:
        """A word per token."""
        tags = torch.zeros(rows, length, dtype=torch.long)
        return {"labels": tags, POSITIONS: torch.zeros_like(tags)}

    def loss_sum(self, rows: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Cross-entropy."""
        return F.cross_entropy(rows.float(), targets, reduction="sum")

    def metrics(self, labels: Labels) -> tuple[str, ...]:
        """Entity F1 where the tags are of entities (B-PER, I-PER, O ...), else accuracy."""
        return ("f1", "accuracy") if has_entities(labels) else ("accuracy", "f1_macro")

    def score(self, predictions: np.ndarray, targets: np.ndarray, labels: Labels) -> Scores:
        """accuracy and f1_macro over words; with entities precision, recall and f1 of whole entities.

        Words that a model never sees, beyond max_length, count: as told to be O, where there is such a tag, else as
        wrong, like words with a NaN logit.
        """
        words, unseen = targets != NOTHING, targets <= CUT
        wanted = np.where(unseen, CUT - targets, targets)
        found = np.where(np.isnan(predictions).any(-1), -1, predictions.argmax(-1))  # -1 is no tag
        found = np.where(unseen, labels.index(OUTSIDE) if OUTSIDE in labels else -1, found)
        scores = metrics.of_classes(found[words], wanted[words])
        if has_entities(labels):
            names = np.array([*labels, OUTSIDE], object)
            tags = [[names[row[real]].tolist() for row, real in zip(of, words, strict=True)] for of in (wanted, found)]
            scores = {**entity_f1(*tags), **scores}
        return scores

    def asked(self, targets: np.ndarray) -> np.ndarray:
        """The words that are seen."""
        return targets >= 0

    def ignorance(self, train: Split, labels: Labels) -> np.ndarray:
        """Log frequencies of the tags, each counted once more."""
        counts = np.bincount([tag for tags in train.labels for tag in tags], minlength=len(labels)) + 1
        return np.log(counts / counts.sum())

    def features(self, states: torch.Tensor, batch: Batch) -> torch.Tensor:
        """The states of each word's first piece [B, W, D]."""
        return self.answers(states, batch)


class TaggedWords(LabelledTexts):
    """Texts as lists of words, cut into pieces once; a batch is padded to its own longest text."""

    padding_side = "right"  # places are counted from the first piece

    def __init__(self, split: Split, tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> None:
        if not tokenizer.is_fast:
            problem = "is a slow tokenizer, which does not tell the pieces of a word: expected one with tokenizer.json"
            raise InputError(tokenizer.name_or_path, problem)
        blank = _before_a_word(tokenizer)
        texts = [[blank + word if word[:1].strip() else word for word in words] for words in split.texts]
        self._tokenizer, self._max_length = tokenizer, max_length
        cut = max_length is not None
        self._encoded = tokenizer(texts, is_split_into_words=True, truncation=cut, max_length=max_length)
        width = max(len(tags) for tags in split.labels)
        labels = np.full((len(split), width), NOTHING, np.int64)
        positions = np.zeros_like(labels)
        for row, tags in enumerate(split.labels):
            labels[row, : len(tags)] = CUT - np.array(tags)
            for place, word in reversed(list(enumerate(self._encoded.word_ids(row)))):
                if word is not None:
                    labels[row, word], positions[row, word] = tags[word], place
        self.labels, self._positions = torch.from_numpy(labels), torch.from_numpy(positions)

    def readable_by(self, config: PretrainedConfig, prompts: int = 0) -> TaggedWords:
        """Itself; InputError for tokens that the base does not know: a head that looks at every one can read any."""
        self._require_embedded(config, prompts)
        return self

    def batch(self, items: list[Item]) -> Batch:
        rows = [index for _, index in items]
        return {**super().batch(items), POSITIONS: self._positions[rows]}

    def digest(self, index: int) -> bytes:
        """Of the pieces, and of where the words begin among them."""
        return hashlib.sha256(super().digest(index) + self._positions[index].numpy().tobytes()).digest()[:16]


def _before_a_word(tokenizer: PreTrainedTokenizerBase) -> str:
    """What a word by itself needs before it, to be cut into pieces as in running text: a blank, or nothing.

    Where pieces hold the blanks (byte-level BPE, as RoBERTa's), a word has others at the very beginning of a text.
    """

    def pieces(given: str | list[str]) -> list[int]:
        return tokenizer(given, add_special_tokens=False, is_split_into_words=isinstance(given, list))["input_ids"]

    return "" if pieces(["a"]) == pieces("a a")[len(pieces("a")) :] else " "
