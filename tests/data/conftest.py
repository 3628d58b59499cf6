"""Small tokenizers that count their calls, for the tests of data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast
from worlds import make_tokenizer

WORDS = [*"abcdefghijklmnopqrstuvwxyz", *(f"w{i}" for i in range(100))]


class CountingTokenizer(PreTrainedTokenizerFast):
    """Counts its calls."""

    calls = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return super().__call__(*args, **kwargs)


@pytest.fixture
def tokenizer_factory() -> Callable[..., CountingTokenizer]:
    return lambda words=WORDS, bert=True: make_tokenizer(words, CountingTokenizer, bert=bert)


@pytest.fixture
def tokenizer(tokenizer_factory: Callable[..., CountingTokenizer]) -> CountingTokenizer:
    return tokenizer_factory()
