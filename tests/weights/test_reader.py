"""What pads texts, where base and tokenizer agree on it, where they do not, and where neither knows of anything."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from decoders import BEGIN, END, PAD, UNKNOWN, decoder_config, decoder_tokenizer, make_decoder
from transformers import AutoTokenizer

from recyclable.errors import InputError
from recyclable.weights.base import Base, read_config
from recyclable.weights.reader import Reader

CLASSES, WORDS, TEXT = "SequenceClassification", "TokenClassification", "CausalLM"


def reader(folder: Path, family: str, of_config: int | None, **tokenizer: Any) -> Reader:
    decoder_config(family, pad_token_id=of_config).save_pretrained(folder)
    decoder_tokenizer(family, **tokenizer).save_pretrained(folder)
    return Reader(read_config(folder), folder)


@pytest.mark.parametrize(
    ("of_config", "tokenizer", "chosen"),
    [
        (PAD, {"pad_token": "<pad>"}, PAD),
        (BEGIN, {"pad_token": "<pad>"}, PAD),
        (None, {"pad_token": "<pad>"}, PAD),
        (PAD, {}, PAD),
        (-1, {}, END),
        (None, {}, END),
        (None, {"eos_token": None}, UNKNOWN),
        (None, {"ends": True}, UNKNOWN),
        (END, {"ends": True}, UNKNOWN),
        (None, {"ends": True, "pad_token": "</s>"}, UNKNOWN),
        (END, {"ends": True, "pad_token": "</s>"}, END),
    ],
)
def test_the_pad_token_is_none_that_stands_behind_every_text_but_where_all_agree_on_it(
    tmp_path: Path, of_config: int | None, tokenizer: dict[str, Any], chosen: int
) -> None:
    made = reader(tmp_path, "llama", of_config, **tokenizer)
    assert made.tokenizer().pad_token_id == chosen
    assert made.fields(CLASSES) == ({} if of_config == chosen else {"pad_token_id": chosen})
    assert made.config_for(CLASSES).pad_token_id == chosen
    assert made.fields(TEXT) == made.fields(WORDS) == {}, "nothing there reads it"


def test_what_else_reads_the_same_is_written_with_what_leaves(tmp_path: Path) -> None:
    made = reader(tmp_path, "gpt2", None)
    assert made.settings(CLASSES) == {"pad_token": "</s>", "padding_side": "right"}
    assert made.settings(TEXT) == {"pad_token": "</s>"}, "generation pads on the left"
    assert made.tokenizer().padding_side == "right"
    assert AutoTokenizer.from_pretrained(tmp_path).padding_side == "left"
    agreed = reader(tmp_path / "agreed", "gpt2", PAD, pad_token="<pad>", side="right")
    assert agreed.settings(CLASSES) == {}


def test_without_any_token_to_pad_with_it_is_refused_where_texts_are_read(tmp_path: Path) -> None:
    made = reader(tmp_path, "gpt2", None, eos_token=None, unk_token=None)
    assert made.fields(CLASSES) == {}
    with pytest.raises(InputError, match="has no pad token, and no end or unknown token that could stand for one"):
        made.tokenizer()


def test_a_pad_token_that_weights_were_tuned_with_goes_before_the_bases_own(tmp_path: Path) -> None:
    base = Base(make_decoder(tmp_path, "gpt2", tokenizer=decoder_tokenizer("gpt2", pad_token="<pad>")))
    weights = SimpleNamespace(manifest=SimpleNamespace(config={"pad_token_id": BEGIN}), tokenizer=None, prompts=0)
    of_weights = Reader.of(base, weights)
    assert of_weights.tokenizer().pad_token_id == BEGIN and of_weights.fields(CLASSES) == {}
    assert Reader.of(base).tokenizer().pad_token_id == PAD and Reader.of(base).fields(CLASSES) == {"pad_token_id": PAD}
