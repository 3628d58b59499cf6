"""Prompts and continuations in tokens: what generation starts from, and seams that a token would reach over."""

from __future__ import annotations

import pytest
from spoken import byte_level, sentence_pieces, with_end
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from worlds import make_tokenizer

from recyclable.data.prompts import added, continuations, inside, prompt_tokens
from recyclable.errors import InputError

SEAMS = [
    ("The capital of France is", " Paris."),
    ("The capital of France is ", "Paris."),
    ("Answer:", "yes"),
    ("Answer: ", "yes"),
    ("Answer:\n", "\nno"),
    ("Hel", "lo there"),
    ("Answer: y", "es"),
]


@pytest.mark.parametrize("make", [byte_level, sentence_pieces])
@pytest.mark.parametrize(("prompt", "response"), SEAMS)
def test_a_prompt_and_what_follows_read_as_both_texts_joined(make, prompt: str, response: str) -> None:
    tokenizer = make()
    (before,), (behind,) = prompt_tokens(tokenizer, [prompt]), continuations(tokenizer, [prompt], [response])
    assert before == tokenizer(prompt)["input_ids"]  # these tokenizers put nothing behind a text
    assert tokenizer.decode([*before, *behind], skip_special_tokens=True) == prompt + response


@pytest.mark.parametrize("make", [byte_level, sentence_pieces])
def test_where_no_token_reaches_over_the_seam_the_tokens_are_those_of_the_joined_text(make) -> None:
    tokenizer = make()
    (behind,) = continuations(tokenizer, ["The capital of France is"], [" Paris"])
    joined = tokenizer("The capital of France is Paris")["input_ids"]
    assert joined[-len(behind) :] == behind and behind


def test_a_response_that_is_lost_in_the_prompts_last_token_is_cut_by_itself() -> None:
    tokenizer = make_tokenizer(bert=False)
    assert tokenizer("nosuch")["input_ids"] == tokenizer("nosuchw3")["input_ids"] == [tokenizer.unk_token_id]
    assert continuations(tokenizer, ["nosuch"], ["w3"]) == [tokenizer("w3")["input_ids"]]


def test_a_piece_inside_of_a_text_has_no_blank_put_before_it() -> None:
    tokenizer = sentence_pieces()
    assert tokenizer.tokenize("Paris") == ["▁Paris"]
    assert tokenizer.convert_ids_to_tokens(inside(tokenizer, "Paris")) == ["Paris"]
    assert tokenizer.convert_ids_to_tokens(inside(tokenizer, " Paris")) == ["▁Paris"]
    assert inside(tokenizer, "") == []


@pytest.mark.parametrize(
    ("tokenizer", "around"),
    [
        (byte_level(), ([], [])),
        (byte_level(begin=True), ([0], [])),
        (sentence_pieces(), ([1], [])),
        (with_end(), ([], [1])),
        (make_tokenizer(), ([2], [3])),
    ],
)
def test_what_is_put_around_a_text_is_found(tokenizer: PreTrainedTokenizerFast, around: tuple) -> None:
    assert added(tokenizer) == around


def test_what_is_put_behind_a_text_is_not_behind_a_prompt() -> None:
    tokenizer = make_tokenizer()
    assert tokenizer("w1 w2")["input_ids"][-1] == tokenizer.sep_token_id
    assert prompt_tokens(tokenizer, ["w1 w2"]) == [tokenizer("w1 w2")["input_ids"][:-1]]


def test_an_empty_prompt_starts_from_the_token_that_begins_or_ends_texts() -> None:
    tokenizer = byte_level()
    assert prompt_tokens(tokenizer, ["", "no"]) == [[tokenizer.bos_token_id], tokenizer("no")["input_ids"]]
    tokenizer.bos_token = None
    assert prompt_tokens(tokenizer, [""]) == [[tokenizer.eos_token_id]]
    tokenizer.eos_token = None
    with pytest.raises(InputError, match="makes no token of a prompt"):
        prompt_tokens(tokenizer, [""])
    assert prompt_tokens(byte_level(begin=True), [""]) == [[0]]


def test_a_tokenizer_that_knows_no_a_is_seen_by_another_text() -> None:
    backend = Tokenizer(models.BPE({"x": 0, "y": 1}, []))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert added(tokenizer, "x") == ([], []) and prompt_tokens(tokenizer, ["x"]) == [[0]]
