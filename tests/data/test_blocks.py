"""Packed documents keep their borders, and what is predicted of them stays within."""

from __future__ import annotations

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from language_models import CAUSAL, SENTINELS, SPANS, tokenizer_of

from recyclable.data.blocks import CausalBlocks, MaskedBlocks, SpanBlocks
from recyclable.data.corruption import Spans, corrupted
from recyclable.data.layout import streamed
from recyclable.data.packing import Joined, Packed, pack

pytestmark = pytest.mark.usefixtures("own_cache")
BEGIN, END = 2, 3
FIRST_SENTINEL = 4
WORD = FIRST_SENTINEL + len(SENTINELS)  # w0's id
TAKEN = Spans(0.15, 3.0, tuple(range(FIRST_SENTINEL, WORD)), special=(0, 1, BEGIN, END))


def texts(*sizes: int) -> datasets.Dataset:
    """Documents of so many words, w0 w1 ... on through all of them."""
    words, documents = iter(f"w{i % 190}" for i in range(sum(sizes))), []
    for size in sizes:
        documents.append(" ".join(next(words) for _ in range(size)))
    return datasets.Dataset.from_dict({"text": documents})


def rows(packed: Packed) -> tuple[list[list[int]], list[list[int]]]:
    return [packed[i].tolist() for i in range(len(packed))], [packed.documents(i).tolist() for i in range(len(packed))]


def test_a_decoder_s_stream_begins_and_ends_every_document_and_knows_where() -> None:
    tokenizer, w = tokenizer_of(CAUSAL), WORD
    packed = pack(texts(2, 3, 1), tokenizer, 4, streamed(tokenizer))
    ids, documents = rows(packed)
    assert ids == [[BEGIN, w, w + 1, END], [BEGIN, w + 2, w + 3, w + 4], [BEGIN, BEGIN, w + 5, END]]
    assert documents == [[0, 0, 0, 0], [0, 0, 0, 0], [0, 1, 1, 1]]
    assert packed.tokens == 6


def test_a_decoder_s_sequence_that_begins_within_a_document_begins_as_its_tokenizer_begins_a_text() -> None:
    """In place of a token: some decoders tell nothing of a text that does not begin so."""
    tokenizer, w = tokenizer_of(CAUSAL), WORD
    packed = pack(texts(8, 4), tokenizer, 5, streamed(tokenizer))
    # stream: <s> w0 w1 w2 w3 | w4 w5 w6 w7 </s> | <s> w8 w9 w10 w11 | </s>
    assert rows(packed)[0] == [
        [BEGIN, *range(w, w + 4)],
        [BEGIN, w + 5, w + 6, w + 7, END],
        [BEGIN, *range(w + 8, w + 12)],
    ]
    assert packed.tokens == 11


def test_a_tokenizer_that_begins_no_text_gives_a_stream_without_begin_tokens() -> None:
    packed = pack(texts(2, 3), tokenizer_of(SPANS), 4, streamed(tokenizer_of(SPANS)))
    assert rows(packed) == ([[WORD, WORD + 1, END, WORD + 2]], [[0, 0, 0, 1]])


def test_wrapped_sequences_give_begin_and_end_to_their_first_and_last_document(tokenizer) -> None:
    packed = pack(datasets.Dataset.from_dict({"text": ["a b", "c", "d e f"]}), tokenizer, 6)
    # stream: a b [SEP] c | [SEP] d e f
    assert rows(packed) == ([[2, 5, 6, 3, 7, 3], [2, 3, 8, 9, 10, 3]], [[0, 0, 0, 0, 1, 1], [0, 0, 1, 1, 1, 1]])


def test_documents_over_many_batches_are_those_of_one(tokenizer, monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    sizes = np.random.default_rng(0).integers(1, 9, size=60).tolist()
    whole = rows(pack(texts(*sizes), tokenizer_of(CAUSAL), 7, streamed(tokenizer_of(CAUSAL))))
    monkeypatch.setattr("recyclable.data.packing._BATCH", 3)
    parts = rows(pack(texts(*sizes), tokenizer_of(CAUSAL), 7, streamed(tokenizer_of(CAUSAL)), cache_dir=tmp_path))
    assert parts == whole
    ids, documents = (np.array(table) for table in whole)
    assert (np.diff(documents, axis=1) == (ids[:, 1:] == BEGIN)).all()


def test_a_causal_token_is_told_within_its_document_alone() -> None:
    tokenizer = tokenizer_of(CAUSAL)
    packed = pack(texts(2, 3, 1, 4, 6, 2), tokenizer, 8, streamed(tokenizer))
    items = [(0, row) for row in range(len(packed))]
    batch = CausalBlocks(packed, range(len(packed)), apart=True).batch(items)
    flat, documents = batch["input_ids"].flatten(), batch["documents"].flatten()
    told = dict(zip(batch["positions"].tolist(), batch["targets"].tolist(), strict=True))
    for place in range(len(flat)):
        inside = (place + 1) % 8 != 0 and documents[place] == documents[place + 1]
        assert (place in told) == bool(inside)
        assert place not in told or told[place] == flat[place + 1]
    assert BEGIN not in batch["targets"], "a document's first token was to be told from another document"
    together = CausalBlocks(packed, range(len(packed)), apart=False).batch(items)
    assert len(together["targets"]) == 7 * len(packed) and "documents" not in together


def test_masks_are_the_same_whether_documents_are_kept_apart_or_not(tokenizer) -> None:
    packed = pack(datasets.Dataset.from_dict({"text": ["a b c d e f g"] * 20}), tokenizer, 12)
    apart, together = (
        MaskedBlocks(packed, tokenizer, 0.3, 1, range(len(packed)), keep).batch([(0, 3), (1, 2)])
        for keep in (True, False)
    )
    assert apart.pop("documents").shape == (2, 12)
    assert apart.keys() == together.keys() and all(torch.equal(apart[name], together[name]) for name in apart)


@given(st.lists(st.integers(WORD, WORD + 50), max_size=60), st.integers(0, 5))
def test_a_text_is_its_encoder_s_side_with_the_decoder_s_spans_put_back(words: list[int], seed: int) -> None:
    text = np.array([*words, END])
    read, told = corrupted(text, TAKEN, END, np.random.default_rng(seed))
    assert len(read) <= len(text)
    if len(words) < 2:
        assert read.tolist() == text.tolist() and len(told) == 0
        return
    assert told[-1] == END and not set(told) & set(read) - set(SENTINEL_IDS) - {END} - set(words)
    spans: dict[int, list[int]] = {}
    for token in told[:-1].tolist():
        if token in SENTINEL_IDS:
            spans[token] = []
        else:
            spans[list(spans)[-1]].append(token)
    assert list(spans) == [token for token in read.tolist() if token in SENTINEL_IDS] == SENTINEL_IDS[: len(spans)]
    whole = [word for token in read.tolist() for word in spans.get(token, [token])]
    assert whole == text.tolist()
    taken = [word for span in spans.values() for word in span]
    assert len(taken) == min(max(round(0.15 * len(words)), 1), len(words) - 1) and all(spans.values())


SENTINEL_IDS = list(range(FIRST_SENTINEL, WORD))


def test_spans_have_the_density_and_the_length_that_are_asked_for() -> None:
    text = np.append(np.full(200, WORD), END)
    drawn = [corrupted(text, TAKEN, END, np.random.default_rng(seed))[1] for seed in range(50)]
    assert {sum(token == WORD for token in told) for told in drawn} == {30}
    assert {sum(token < WORD and token != END for token in told) for told in drawn} == {10}
    short = [corrupted(np.arange(WORD, WORD + 8), TAKEN, END, np.random.default_rng(seed))[1] for seed in range(100)]
    assert {told[1] for told in short} == set(range(WORD, WORD + 8)), "every token of a short text is asked for"


def spans_of(packed: Packed | Joined, apart: bool, seed: int = 1) -> SpanBlocks:
    return SpanBlocks(packed, TAKEN, END, 0, seed, range(len(packed)), apart)


def test_each_document_has_sentinels_and_a_decoder_s_start_of_its_own() -> None:
    packed = pack(texts(*[8] * 12), tokenizer_of(SPANS), 28)  # of three documents
    batch = spans_of(packed, apart=True).batch([(0, row) for row in range(len(packed))])
    for side in ("", "decoder_"):
        assert {name: batch[f"{side}{name}"].shape for name in ("input_ids", "attention_mask", "documents")}
        assert torch.equal(batch[f"{side}documents"] >= 0, batch[f"{side}attention_mask"] == 1)
    for row in range(len(packed)):
        for document in (0, 1, 2):
            told = batch["decoder_input_ids"][row][batch["decoder_documents"][row] == document]
            assert told[:2].tolist() == [0, FIRST_SENTINEL]
    length = batch["decoder_input_ids"].shape[1]
    for place, target in zip(batch["positions"].tolist(), batch["targets"].tolist(), strict=True):
        row, at = divmod(place, length)
        following = batch["decoder_documents"][row, at + 1].item() if at + 1 < length else -1
        same = following == batch["decoder_documents"][row, at]
        assert target == (batch["decoder_input_ids"][row, at + 1] if same else END)
    together = spans_of(packed, apart=False).batch([(0, 0)])
    assert (together["decoder_input_ids"] == FIRST_SENTINEL).sum() == 1 and "documents" not in together


def test_spans_are_a_function_of_seed_epoch_and_block() -> None:
    packed = pack(texts(*[20] * 10), tokenizer_of(SPANS), 40)
    batch = spans_of(packed, True).batch
    again, other_seed = batch([(0, 1), (0, 2)]), spans_of(packed, True, seed=2).batch([(0, 1), (0, 2)])
    assert all(torch.equal(value, again[name]) for name, value in batch([(0, 1), (0, 2)]).items())
    assert not torch.equal(batch([(0, 1)])["targets"], batch([(1, 1)])["targets"])
    assert not torch.equal(again["targets"], other_seed["targets"])


def test_a_block_of_texts_too_short_to_take_anything_out_has_a_decoder_with_padding_alone() -> None:
    packed = pack(texts(*[1] * 12), tokenizer_of(SPANS), 6)
    batch = spans_of(packed, True).batch([(0, 0)])
    assert batch["decoder_input_ids"].shape == (1, 1) and batch["decoder_documents"].tolist() == [[-1]]
    assert len(batch["targets"]) == len(batch["positions"]) == 0


def test_joined_corpora_are_one_behind_the_other() -> None:
    first, second = (pack(texts(*sizes), tokenizer_of(SPANS), 5) for sizes in ([9, 9], [2, 2, 2, 2]))
    joined = Joined(first, second)
    assert len(joined) == len(first) + len(second)
    for i in range(len(joined)):
        part, place = (first, i) if i < len(first) else (second, i - len(first))
        assert joined[i].tolist() == part[place].tolist()
        assert joined.documents(i).tolist() == part.documents(place).tolist()
