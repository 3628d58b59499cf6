"""Batches that a base can run: no longer than its positions, no tokens or types that it has no embedding of."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig, RobertaConfig
from worlds import WORDS, make_tokenizer

from recyclable.data.examples import LabelledTexts, model_inputs
from recyclable.data.split import Split
from recyclable.errors import InputError
from recyclable.tasks.tokens import TaggedWords
from recyclable.weights.base import read_config

SIZE = {"vocab_size": 200, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
CONFIGS = {
    "bert": BertConfig(**SIZE, max_position_embeddings=50),
    "roberta": RobertaConfig(**SIZE, max_position_embeddings=52, type_vocab_size=1, pad_token_id=1, bos_token_id=0),
}
LONG, SHORT = " ".join(WORDS[:70]), " ".join(WORDS[:9])


def make(folder: Path, family: str) -> Path:
    """A base of a family, with a tokenizer that pads with the token that its positions take no notice of."""
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_config(CONFIGS[family]).save_pretrained(folder)
    tokenizer = make_tokenizer()
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(CONFIGS[family].pad_token_id)
    if family == "roberta":
        tokenizer.model_input_names = ["input_ids", "attention_mask"]
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("length", [50, 49, 48, 20])
def test_texts_that_fill_the_positions_of_a_base_run_as_in_plain_transformers(
    family: str, length: int, tmp_path: Path
) -> None:
    base = make(tmp_path, family)
    tokenizer, model = AutoTokenizer.from_pretrained(base), AutoModelForSequenceClassification.from_pretrained(base)
    examples = LabelledTexts(Split([LONG, SHORT], None, [0, 1]), tokenizer, length).readable_by(read_config(base))
    batch = examples.batch([(0, 0), (0, 1)])
    assert batch["input_ids"].shape == (2, length)
    plain = [tokenizer(t, truncation=True, max_length=length, return_tensors="pt") for t in (LONG, SHORT)]
    with torch.no_grad():
        wanted = torch.cat([model(**one).logits for one in plain])
        torch.testing.assert_close(model(**model_inputs(batch)).logits, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("words", "width"), [(9, 16), (14, 16), (15, 17), (18, 20), (30, 21)])
def test_lengths_are_rounded_up_to_8_where_that_is_no_more_than_texts_are_cut_to(words: int, width: int) -> None:
    examples = LabelledTexts(Split([" ".join(WORDS[:words])], None, [0]), make_tokenizer(), 21)
    assert examples.batch([(0, 0)])["input_ids"].shape[1] == width


@pytest.mark.parametrize("kind", [LabelledTexts, TaggedWords])
def test_without_a_limit_no_text_is_cut_or_padded_beyond_the_longest(kind: type[LabelledTexts], tmp_path: Path) -> None:
    texts = [LONG, SHORT] if kind is LabelledTexts else [LONG.split(), SHORT.split()]
    labels = [0, 1] if kind is LabelledTexts else [[0] * 70, [1] * 9]
    examples = kind(Split(texts, None, labels), make_tokenizer(), None)
    assert examples.lengths.tolist() == [72, 11]
    assert examples.batch([(0, 1), (0, 0)])["input_ids"].shape == (2, 72)
    config = read_config(make(tmp_path, "bert"))
    with pytest.raises(InputError, match=r"makes 72 tokens of a text that is not cut, but .* positions for 50"):
        examples.readable_by(config)
    config.max_position_embeddings = 72
    assert examples.readable_by(config) is examples


def test_token_types_that_a_base_lacks_are_refused_where_plain_transformers_fails(tmp_path: Path) -> None:
    base, tokenizer = make(tmp_path, "roberta"), make_tokenizer()
    model = AutoModelForSequenceClassification.from_pretrained(base)
    with pytest.raises(IndexError):
        model(**tokenizer("w1", "w2", return_tensors="pt"))
    pairs = LabelledTexts(Split(["w1"], ["w2"], [0]), tokenizer, 16)
    with pytest.raises(InputError, match=r"gives token type 1, but .*config\.json has type_vocab_size 1"):
        pairs.readable_by(read_config(base))
    alone = LabelledTexts(Split(["w1"], None, [0]), tokenizer, 16).readable_by(read_config(base))
    assert model(**model_inputs(alone.batch([(0, 0)]))).logits.shape == (1, 2)


def test_a_base_that_embeds_no_types_reads_any(tmp_path: Path) -> None:
    config = read_config(make(tmp_path, "bert"))
    config.type_vocab_size = 0  # as DeBERTa's say
    pairs = LabelledTexts(Split(["w1"], ["w2"], [0]), make_tokenizer(), 16)
    assert pairs.readable_by(config) is pairs


@pytest.mark.parametrize("kind", [LabelledTexts, TaggedWords])
@pytest.mark.parametrize("token", ["w194", "[PAD]"])
def test_tokens_that_a_base_lacks_are_refused_where_plain_transformers_fails(
    kind: type[LabelledTexts], token: str, tmp_path: Path
) -> None:
    base, tokenizer = make(tmp_path, "bert"), make_tokenizer([*WORDS, "more"])
    word, beyond = ("w3", "more") if token == "[PAD]" else ("more", "more")
    if token == "[PAD]":
        tokenizer.pad_token = beyond
    split = Split([word], None, [0]) if kind is LabelledTexts else Split([[word]], None, [[0]])
    with pytest.raises(IndexError):
        AutoModelForSequenceClassification.from_pretrained(base)(**tokenizer(beyond, return_tensors="pt"))
    with pytest.raises(InputError, match=r"gives the token 'more' with id 200, but .*config\.json has vocab_size 200"):
        kind(split, tokenizer, 16).readable_by(read_config(base))
