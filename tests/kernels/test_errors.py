"""benchmarks/kernels.py tells errors against fp64 that are of the size that each way of computing has."""

from __future__ import annotations

import kernels
import pytest


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, float] | None]:
    ways = {"ours": kernels.PEERS["ours"], "ours_bf16": kernels.PEERS["ours_bf16"], "unfused": kernels.usual}
    makers = {**ways, "absent": lambda *_: None}
    return kernels.errors(makers, vocabulary=700, hidden=96, device="cpu", rounded=True)


def test_fp32_logits_lose_little_more_than_what_is_rounded_at_the_end(found) -> None:
    ours, rounded = found["ours"], found["rounded"]
    assert 0 <= ours["loss"] < 1e-6
    assert all(1e-3 < rounded[what] <= ours[what] < 3 * rounded[what] for what in ("hidden", "weight"))


@pytest.mark.parametrize("of", kernels.OF)
def test_16_bit_logits_lose_more_and_no_more_than_the_unfused_formulas(found, of: str) -> None:
    assert found["ours"][of] < found["ours_bf16"][of] < 1.5 * found["unfused"][of] < 0.02


def test_a_peer_that_is_not_there_is_null(found) -> None:
    assert found["absent"] is None
