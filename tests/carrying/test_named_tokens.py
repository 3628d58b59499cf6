"""Tokens that fields of a config name follow their rows; those that are gone are no longer named."""

from __future__ import annotations

import numpy as np

from recyclable.carrying.named_tokens import names_tokens, with_moved_tokens
from recyclable.weights.vocabulary import Rows

ROWS = Rows(np.array([0, 2, -1, 1, 3]), ("new",), ("gone",))
"""Old rows 1 and 2 have changed places with 3 and 1; 4 is gone."""


def test_ids_alone_in_lists_and_inside_other_fields_move() -> None:
    fields = {
        "pad_token_id": 1,
        "eos_token_id": [2, 3],
        "bos_token_id": None,
        "layer_norm_eps": 1,
        "generation_config": {"eos_token_id": 2, "top_k": 2, "bad_words_ids": [[1, 2], [0]]},
    }
    assert with_moved_tokens(fields, ROWS) == {
        "pad_token_id": 3,
        "eos_token_id": [1, 4],
        "bos_token_id": None,
        "layer_norm_eps": 1,
        "generation_config": {"eos_token_id": 1, "top_k": 2, "bad_words_ids": [[3, 1], [0]]},
    }


def test_a_token_that_is_gone_is_no_longer_named() -> None:
    fields = {"pad_token_id": 4, "eos_token_id": [4, 1], "suppress_tokens": [4]}
    assert with_moved_tokens(fields, ROWS) == {"eos_token_id": [3]}


def test_fields_that_name_none_are_told_apart() -> None:
    assert names_tokens({"text_config": {"pad_token_id": 1}}) and names_tokens({"suppress_tokens": []})
    assert not names_tokens({"vocab_size": 3, "text_config": {"eps": 1}})
