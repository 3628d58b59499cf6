"""Small tokenizers and file writers for the tests of data; the cache of `datasets` in a folder of the test."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import worlds
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast
from worlds import SPECIALS

WORDS = [*"abcdefghijklmnopqrstuvwxyz", *(f"w{i}" for i in range(100))]


class CountingTokenizer(PreTrainedTokenizerFast):
    """Counts its calls."""

    calls = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return super().__call__(*args, **kwargs)


def make_tokenizer(words: list[str] = WORDS, bert: bool = True) -> CountingTokenizer:
    """A word-level tokenizer in BERT's manner, or one that adds nothing to the text."""
    if bert:
        return worlds.make_tokenizer(words, CountingTokenizer)
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate([*SPECIALS, *words])}, unk_token="[UNK]"))
    backend.pre_tokenizer = Whitespace()
    return CountingTokenizer(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]")


@pytest.fixture
def tokenizer() -> CountingTokenizer:
    return make_tokenizer()


@pytest.fixture
def tokenizer_factory() -> Callable[..., CountingTokenizer]:
    return make_tokenizer


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test sees what another one cached."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    return folder


@pytest.fixture
def write_rows() -> Callable[[Path, list[dict[str, Any]]], Path]:
    """Write rows to a file in the format of its name; returns the path."""

    def write(path: Path, rows: list[dict[str, Any]]) -> Path:
        import pandas as pd

        name = path.name.removesuffix(".gz")
        if name.endswith(".parquet"):
            pd.DataFrame(rows).to_parquet(path, index=False)
            return path
        if name.endswith(".txt"):
            content = "".join(row["text"] + "\n" for row in rows)
        elif name.endswith(".jsonl"):
            content = "".join(json.dumps(row) + "\n" for row in rows)
        elif name.endswith(".json"):
            content = json.dumps(rows, indent=1)
        else:
            content = pd.DataFrame(rows).to_csv(index=False, sep="\t" if name.endswith(".tsv") else ",")
        data = content.encode()
        path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
        return path

    return write


@pytest.fixture
def real_data() -> Path:
    """The folder with tasks/ and corpora/ that RECYCLABLE_DATA names; the test is skipped without it."""
    if not os.environ.get("RECYCLABLE_DATA"):
        pytest.skip("RECYCLABLE_DATA is not set")
    return Path(os.environ["RECYCLABLE_DATA"])
