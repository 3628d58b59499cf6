"""By what a tokenizer reads: whatever changes a text's inputs changes it, however it was saved and by whom does not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import normalizers
from tokenizers_in_python import make_phobert
from transformers import AutoTokenizer, BertConfig, PreTrainedTokenizerBase
from worlds import WORDS, make_base, make_tokenizer

from recyclable.weights.base import Base
from recyclable.weights.reading import reading, reading_digest

PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "##c", "Hello", "hello"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("reading") / "base", hidden=8, layers=1)


@pytest.fixture(scope="module")
def phobert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_phobert(tmp_path_factory.mktemp("phobert") / "base")


def saved(folder: Path, tokenizer: PreTrainedTokenizerBase, config: Any) -> Path:
    tokenizer.save_pretrained(folder)
    config.save_pretrained(folder)
    return folder


def edited(folder: Path, **changed: Any) -> None:
    """The tokenizer's config with some keys changed."""
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changed}))


def test_saved_again_or_after_use_it_reads_the_same(base: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer(["w1 w2", "w3"], padding="max_length", truncation=True, max_length=8)
    tokenizer.model_max_length = 17
    again = saved(tmp_path / "again", tokenizer, Base(base).config)
    assert (again / "tokenizer.json").read_bytes() != (base / "tokenizer.json").read_bytes()
    edited(again, transformers_version="4.1.0", clean_up_tokenization_spaces=True, processor_class="X", max_length=3)
    assert reading_digest(again) == reading_digest(base)


def test_a_vocabulary_file_alone_reads_as_the_file_made_of_it(tmp_path: Path) -> None:
    slow, config = tmp_path / "slow", BertConfig(vocab_size=len(PIECES))
    config.save_pretrained(slow)
    (slow / "vocab.txt").write_text("\n".join(PIECES) + "\n")
    fast = saved(tmp_path / "fast", AutoTokenizer.from_pretrained(slow), config)
    assert (fast / "tokenizer.json").is_file() and not (fast / "vocab.txt").is_file()
    assert reading_digest(fast) == reading_digest(slow)
    (slow / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    assert AutoTokenizer.from_pretrained(slow).tokenize("Hello") == ["Hello"]
    assert reading_digest(fast) != reading_digest(slow)


def cutting_left(tokenizer: Any) -> None:
    tokenizer.truncation_side = tokenizer.init_kwargs["truncation_side"] = "left"  # only what it was made with is saved


def padding_left(tokenizer: Any) -> None:
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"


def with_a_token(tokenizer: Any) -> None:
    tokenizer.add_tokens(["w0w1"])


def with_a_special_token(tokenizer: Any) -> None:
    tokenizer.add_special_tokens({"extra_special_tokens": ["[E1]"]})


def lower_casing(tokenizer: Any) -> None:
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()


def without_token_types(tokenizer: Any) -> None:
    tokenizer.model_input_names = ["input_ids", "attention_mask"]


def padding_with_another(tokenizer: Any) -> None:
    tokenizer.pad_token = "[UNK]"


def with_a_template(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ messages }}"


CHANGES = [
    *(cutting_left, padding_left, with_a_token, with_a_special_token, lower_casing, without_token_types),
    *(padding_with_another, with_a_template),
]


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_changes_inputs_counts(base: Path, tmp_path: Path, change: Callable[[Any], None]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    change(tokenizer)
    config = Base(base).config
    config.vocab_size += 1
    assert reading_digest(saved(tmp_path, tokenizer, config)) != reading_digest(base)


def test_the_same_words_in_other_rows_count(base: Path, tmp_path: Path) -> None:
    other = saved(tmp_path, make_tokenizer([*WORDS[:-2], WORDS[-1], WORDS[-2]]), Base(base).config)
    assert reading_digest(other) != reading_digest(base)


def test_a_tokenizer_in_python_saved_again_reads_the_same(phobert: Path, tmp_path: Path) -> None:
    again = saved(tmp_path, AutoTokenizer.from_pretrained(phobert), Base(phobert).config)
    edited(again, model_max_length=12)
    assert reading_digest(again) == reading_digest(phobert)
    assert reading(phobert)["class"] == "PhobertTokenizer"


@pytest.mark.parametrize("change", [cutting_left, with_a_token])
def test_its_sides_and_added_tokens_count(phobert: Path, tmp_path: Path, change: Callable[[Any], None]) -> None:
    tokenizer, config = AutoTokenizer.from_pretrained(phobert), Base(phobert).config
    change(tokenizer)
    config.vocab_size += 1
    assert reading_digest(saved(tmp_path, tokenizer, config)) != reading_digest(phobert)


def test_its_merges_count(phobert: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(phobert, tmp_path / "other"))
    (other / "bpe.codes").write_text((phobert / "bpe.codes").read_text().replace("th e</w> 9\n", ""))
    before, after = (AutoTokenizer.from_pretrained(folder) for folder in (phobert, other))
    assert before.tokenize("the") != after.tokenize("the") and before.get_vocab() == after.get_vocab()
    assert reading_digest(other) != reading_digest(phobert)


def test_an_option_of_its_class_counts_and_its_default_is_none(phobert: Path, tmp_path: Path) -> None:
    """BERTweet's tokenizer is made of the same files and may normalise tweets first."""
    folders = [Path(shutil.copytree(phobert, tmp_path / name)) for name in ("silent", "default", "normalising")]
    edited(folders[0], tokenizer_class="BertweetTokenizer")
    edited(folders[1], tokenizer_class="BertweetTokenizer", normalization=False)
    edited(folders[2], tokenizer_class="BertweetTokenizer", normalization=True)
    silent, default, normalising = (reading_digest(folder) for folder in folders)
    assert silent == default != normalising
