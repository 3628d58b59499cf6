"""Texts as a student and its teacher read them, each with its own tokenizer, in one batch."""

from __future__ import annotations

import torch
from worlds import WORDS, make_tokenizer

from recyclable.data.examples import LabelledTexts, ReadTwice, as_teacher_reads, model_inputs
from recyclable.data.split import Split
from recyclable.tasks.tokens import POSITIONS, TaggedWords

TEXTS = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9"]
OTHER = make_tokenizer(list(reversed(WORDS)))


def test_a_batch_has_both_and_each_is_what_its_own_would_be() -> None:
    split = Split(TEXTS, None, [0, 1, 2])
    own, others = (LabelledTexts(split, tokenizer, 16) for tokenizer in (make_tokenizer(), OTHER))
    both, items = ReadTwice(own, others), [(0, 2), (0, 0)]
    batch = both.batch(items)
    for found, wanted in ((as_teacher_reads(batch), others.batch(items)), (model_inputs(batch), own.batch(items))):
        assert all(torch.equal(found[name], wanted[name]) for name in found) and "input_ids" in found
    assert not torch.equal(as_teacher_reads(batch)["input_ids"], batch["input_ids"])
    assert torch.equal(batch["labels"], torch.tensor([2, 0])) and len(both) == 3
    assert both.digest(1) == others.digest(1) != own.digest(1), "an answer is known by what the teacher has read"


def test_where_both_read_the_same_a_teacher_reads_the_batch() -> None:
    batch = LabelledTexts(Split(TEXTS, None, [0, 1, 2]), make_tokenizer(), 16).batch([(0, 1)])
    assert as_teacher_reads(batch) is batch


def test_a_teachers_words_have_places_of_their_own() -> None:
    split = Split([text.split() for text in TEXTS], None, [[0] * len(text.split()) for text in TEXTS])
    both = ReadTwice(*(TaggedWords(split, tokenizer, 16) for tokenizer in (make_tokenizer(), OTHER)))
    batch = both.batch([(0, 0), (0, 2)])
    assert as_teacher_reads(batch)[POSITIONS].shape == batch[POSITIONS].shape == (2, 5)
