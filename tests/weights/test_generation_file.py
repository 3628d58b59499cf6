"""`generation_config.json` as data: what is read of it, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import GPT2Config

from recyclable.errors import InputError
from recyclable.weights.generation_file import FILE, read_generation, told_of
from recyclable.weights.generation_rules import rules_of


def write(folder: Path, content: object) -> None:
    (folder / FILE).write_text(json.dumps(content))


def test_bookkeeping_and_what_is_null_are_left_out(tmp_path: Path) -> None:
    assert read_generation(tmp_path) is None
    told = {"eos_token_id": [1, 2], "temperature": 0.5, "do_sample": True}
    write(tmp_path, {**told, "transformers_version": "5", "_from_model_config": True, "top_k": None})
    assert read_generation(tmp_path) == told


@pytest.mark.parametrize("content", [[], {"eos_token_id": 1, "max_new_tokens": -1}, {"watermarking_config": 5}])
def test_a_file_that_transformers_makes_nothing_of_is_bad_input(tmp_path: Path, content: object) -> None:
    write(tmp_path, content)
    with pytest.raises(InputError, match=FILE) as caught:
        read_generation(tmp_path)
    assert len(str(caught.value).splitlines()) == 1


def test_what_weights_brought_along_goes_before_the_base_s_file(tmp_path: Path) -> None:
    write(tmp_path, {"eos_token_id": 1})
    config = GPT2Config(name_or_path=str(tmp_path))
    assert told_of(config) == {"eos_token_id": 1}
    config.generation_config = {"eos_token_id": 2}
    assert told_of(config) == {"eos_token_id": 2}
    config.generation_config = {"watermarking_config": 5}
    with pytest.raises(InputError, match="generation_config"):
        told_of(config)
    assert told_of(GPT2Config()) is None


@pytest.mark.parametrize("told", [{"eos_token_id": "x"}, {"eos_token_id": [1, None]}])
def test_tokens_that_are_no_ids_are_bad_input(tmp_path: Path, told: dict[str, object]) -> None:
    write(tmp_path, told)
    (name,) = told
    with pytest.raises(InputError, match=f"{FILE}: {name} is .*, expected a token's id"):
        rules_of(GPT2Config(name_or_path=str(tmp_path)), SimpleNamespace(eos_token_id=None))


@pytest.mark.parametrize("told", [{"repetition_penalty": -1}, {"no_repeat_ngram_size": -2}, {"sequence_bias": [3]}])
def test_penalties_that_no_text_can_be_begun_with_are_bad_input(tmp_path: Path, told: dict[str, object]) -> None:
    write(tmp_path, told)
    ((name, value),) = told.items()
    with pytest.raises(InputError) as caught:
        rules_of(GPT2Config(name_or_path=str(tmp_path)), SimpleNamespace(eos_token_id=None))
    assert f"{FILE}: {name} is {value!r}, which cannot be used" in str(caught.value)


@pytest.mark.parametrize("pad", [-1, 50])
def test_a_pad_token_that_a_model_has_no_row_for_is_not_padded_with(tmp_path: Path, pad: int) -> None:
    write(tmp_path, {"pad_token_id": pad, "eos_token_id": 7})
    rules = rules_of(GPT2Config(name_or_path=str(tmp_path), vocab_size=50), SimpleNamespace(eos_token_id=None))
    assert rules.pad_token_id == 7
