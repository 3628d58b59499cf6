"""What ranks are said to tell each other, against the bytes that real steps on two ranks send."""

from __future__ import annotations

import os
from typing import Any

import pytest
from plan_configurations import LLAMA, NOTHING_KEPT
from scaling_bytes import count

MODEL = {
    **{**LLAMA, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 128},
    **{"num_hidden_layers": 2, "vocab_size": 5000},
}
CONFIGS: dict[str, dict[str, Any]] = {
    "0": {"zero_optimization": {"stage": 0}},
    "1": {"zero_optimization": {"stage": 1}},
    "2": {"zero_optimization": {"stage": 2}, "train_micro_batch_size_per_gpu": 2},
    "2 as in the paper": {"zero_optimization": {"stage": 2, "use_multi_rank_bucket_allreduce": False}},
    "3": {"zero_optimization": NOTHING_KEPT},
}
SENT = {"0": 2, "1": 3, "2": 5, "2 as in the paper": 2, "3": 3}
"""In weights; stage 2's two micro-batches add gradients up twice."""


@pytest.fixture(scope="module")
def rows() -> dict[str, dict[str, Any]]:
    before = dict(os.environ)
    os.environ["DS_ACCELERATOR"] = "cpu"
    try:
        return {row["name"]: row for row in count(MODEL, CONFIGS)}
    finally:
        os.environ.clear()
        os.environ.update(before)


@pytest.mark.parametrize("name", CONFIGS)
def test_steps_send_what_is_said(rows: dict[str, dict[str, Any]], name: str) -> None:
    row = rows[name]
    sent, weights = sum(row["sent"].values()), row["theory"]["weights"]
    assert sent == pytest.approx(SENT[name] * weights, rel=0.02)  # norms, counts, padding to whole shares
    assert row["theory"]["plan"] == pytest.approx(SENT[name] * weights)


def test_the_papers_volumes_are_those_of_stages_0_and_3_and_of_all_where_reduces_are_not_joined(rows) -> None:
    zero = {name: rows[name]["theory"]["zero"] / rows[name]["theory"]["weights"] for name in CONFIGS}
    assert zero == pytest.approx({"0": 2, "1": 2, "2": 3, "2 as in the paper": 2, "3": 3})
