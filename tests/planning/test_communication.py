"""What ranks are said to tell each other, against the bytes that real steps on two ranks send."""

from __future__ import annotations

import os
from typing import Any

import pytest
from plan_configurations import BF16, LLAMA, NOTHING_KEPT
from scaling_bytes import count

MODEL = {
    **{**LLAMA, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 128},
    **{"num_hidden_layers": 2, "vocab_size": 5000},
}
TWICE = {"train_micro_batch_size_per_gpu": 2}  # two micro-batches
CONFIGS: dict[str, dict[str, Any]] = {
    "0": {"zero_optimization": {"stage": 0}},
    "0 twice": {"zero_optimization": {"stage": 0}, **TWICE},
    "0 twice in bf16": {"zero_optimization": {"stage": 0}, **TWICE, **BF16},
    "1": {"zero_optimization": {"stage": 1}},
    "1 twice": {"zero_optimization": {"stage": 1}, **TWICE},
    "1 twice in bf16": {"zero_optimization": {"stage": 1}, **TWICE, **BF16},
    "2 twice": {"zero_optimization": {"stage": 2}, **TWICE},
    "2 as in the paper": {"zero_optimization": {"stage": 2, "use_multi_rank_bucket_allreduce": False}},
    "3": {"zero_optimization": NOTHING_KEPT},
}
SENT = {
    **{"0": 2, "0 twice": 2, "0 twice in bf16": 2, "1": 3, "1 twice": 3, "1 twice in bf16": 3},
    **{"2 twice": 5, "2 as in the paper": 2, "3": 3},
}
"""In weights; stages 0 and 1 add gradients up once a step, stage 2 after each micro-batch."""


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
    assert zero == pytest.approx({name: 3 if name in ("2 twice", "3") else 2 for name in CONFIGS})
