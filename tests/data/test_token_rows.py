"""Rows of tokens in batches: losses of plain transformers on labels that say the same."""

from __future__ import annotations

import pytest
import torch
from families import config, drawn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from recyclable.data.examples import model_inputs
from recyclable.data.token_rows import TokenRow, batch_of

ROWS = [
    TokenRow([5, 6, 7, 8, 9], [2, 4]),
    TokenRow([5, 6], [1]),
    TokenRow([9, 8, 7], []),
    TokenRow([3, 3, 4, 4, 5, 5, 6, 6, 7], [1, 2, 3, 8]),
]
ANSWERS = [
    TokenRow([0, 6, 7, 2], [1, 2, 3], [4, 5, 6]),
    TokenRow([0], [], [7]),
    TokenRow([0, 2], [1], [8, 9, 8, 9]),
]


def loss(logits: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return F.cross_entropy(logits.flatten(0, 1)[batch["positions"]], batch["targets"])


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_decoders_loss_is_transformers_own_on_labels_of_the_told_tokens(family: str) -> None:
    model = drawn(config(family), AutoModelForCausalLM)
    batch = batch_of(ROWS, 1, None)
    labels = torch.full(batch["input_ids"].shape, -100)
    for number, row in enumerate(ROWS):
        for place in row.told:
            labels[number, place] = row.ids[place]
    inputs = model_inputs(batch)
    assert inputs.keys() == {"input_ids", "attention_mask"}
    torch.testing.assert_close(loss(model(**inputs).logits, batch), model(**inputs, labels=labels).loss)


def test_an_encoder_decoders_loss_is_transformers_own_on_the_answers() -> None:
    model = drawn(config("t5", pad_token_id=0), AutoModelForSeq2SeqLM)
    batch = batch_of(ANSWERS, 0, None)
    labels = torch.full((3, 3), -100)
    for number, row in enumerate(ANSWERS):
        labels[number, : len(row.targets)] = torch.tensor(row.targets)
    wanted = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels)
    inputs = model_inputs(batch)
    real = inputs["decoder_attention_mask"] == 1
    assert torch.equal(inputs["decoder_input_ids"][real], model._shift_right(labels)[real])
    torch.testing.assert_close(loss(model(**inputs).logits, batch), wanted.loss)


@pytest.mark.parametrize(("max_length", "length"), [(None, 9), (9, 9), (15, 9), (16, 16), (100, 16)])
def test_batches_are_as_long_as_the_longest_row_rounded_up_where_that_fits(max_length: int, length: int) -> None:
    batch = batch_of(ROWS, 1, max_length)
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (4, length)
    assert batch["attention_mask"].sum(1).tolist() == [5, 2, 3, 9]
    rows, places = batch["positions"] // length, batch["positions"] % length
    assert torch.equal(batch["targets"], batch["input_ids"][rows, places + 1])
    assert rows.tolist() == [0, 0, 1, 3, 3, 3, 3]


def test_a_batch_may_have_nothing_to_tell() -> None:
    batch = batch_of([ROWS[2]], 1, None)
    assert batch["positions"].shape == batch["targets"].shape == (0,)
    assert batch["positions"].dtype == batch["targets"].dtype == torch.int64


def test_what_identifies_a_row_is_all_that_a_model_is_told_of_it() -> None:
    changed = [ROWS[0], TokenRow([5, 6, 7, 8, 9], [4]), TokenRow([5, 6, 7, 8, 8], [2, 4]), TokenRow([5], [], [4])]
    assert len({row.digest() for row in changed}) == 4
    assert ROWS[0].digest() == TokenRow([5, 6, 7, 8, 9], [2, 4]).digest()
