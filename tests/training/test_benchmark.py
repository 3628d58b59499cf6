"""benchmarks/training.py: its JSON and its tables are what they are said to be; products are counted and turns kept."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import training
from processes import ROOT
from training_case import Case
from training_gpu import SHAPES, step_flops
from training_products import Products
from training_tables import DOCUMENT, TABLES, between_marks, write_tables
from training_turns import Gate, Side
from transformers import BertConfig, BertForMaskedLM, RobertaConfig

from recyclable.recipes.pretrain_settings import read_pretrain_settings

ROW = {
    **{"model": "MiniLM", "stage": 1, "ranks": 2, "precision": "fp32", "ours_tokens_per_s": 2400.0},
    **{"peer_tokens_per_s": 1000.0, "speedup": 2.4, "loss_diff": 1e-6, "ours_peak_mb": 900.0, "peer_peak_mb": 1000.0},
    "gemm_share": 0.61,
}
STACK = {
    **{"adapters": 10, "speedup": 3.2, "max_rel_diff": 1e-6, "alone_s": 100.0, "together_s": 31.0},
    **{"rounding_rel_diff": 2e-6, "max_score_diff": 0.0, "rounding_score_diff": 0.0},
    "curve": [{"adapters": 2, "texts": 4, "speedup": 1.5}],
}
FOUND = {"cpu": [ROW], "stack": STACK, "startup": {"1 rank": 9.04, "2 ranks": 12.0}, "gpu": None}


def test_the_json_has_the_promised_keys_alone() -> None:
    found = json.loads(json.dumps(training.as_json(FOUND)))
    assert found["cpu"] == [ROW]
    assert found["stack"] == {"adapters": 10, "speedup": 3.2, "max_rel_diff": 1e-6}
    assert found["startup"] == {"first_step_s": 9.04}
    assert found["gpu"] is None


def test_a_part_that_was_not_measured_is_null_and_keeps_its_table(tmp_path: Path) -> None:
    document = tmp_path / "performance.md"
    document.write_text(DOCUMENT.read_text())
    write_tables({**FOUND, "stack": None}, "Told of the machine.", document)
    before, after = (path.read_text() for path in (DOCUMENT, document))
    assert "| MiniLM | 1 | 2 | fp32 | 2,400 | 1,000 | 2.40 | 1e-06 | 900 | 1,000 | 61% |" in after
    assert "Told of the machine." in after and "| 1 rank | 9.0 |" in after
    for part in ("stack", "gpu"):
        begin, end = f"<!-- {part} -->", f"<!-- /{part} -->"
        assert between(before, begin, end) == between(after, begin, end)
    assert training.as_json({**FOUND, "stack": None})["stack"] is None


def between(text: str, begin: str, end: str) -> str:
    return text.partition(begin)[2].partition(end)[0]


def test_writing_twice_is_writing_once_and_missing_marks_are_refused() -> None:
    text = DOCUMENT.read_text()
    for part in TABLES:
        once = between_marks(text, part, r"a\1 table")  # nothing in it is a group's number
        assert between_marks(once, part, r"a\1 table") == once and r"a\1 table" in once
    with pytest.raises(ValueError, match="marks"):
        between_marks("no marks", "cpu", "a table")


def test_a_gpu_row_shows_null_as_a_dash() -> None:
    row = {"part": "training", "model": "RoBERTa", "mfu": 0.4567, "tokens_per_s": 253_000.4, "peak_mb": None}
    assert "| RoBERTa | 0.457 | 253,000 | - |" in TABLES["gpu"]([row])


def test_losses_of_other_steps_are_not_compared() -> None:
    assert training.loss_diff({1: 2.0, 2: 3.0}, {1: 2.5, 2: 3.0}) == 0.25
    assert training.loss_diff({1: 2.0, 2: 3.0}, {1: 2.0}) == 0.0  # the last one is told after the end
    with pytest.raises(RuntimeError, match="cannot be compared"):
        training.loss_diff({1: 2.0, 2: 3.0, 3: 4.0}, {1: 2.0})


@pytest.mark.parametrize("lm", ["masked", "causal"])
def test_ours_keeps_no_documents_apart_that_the_peer_knows_nothing_of(lm: str, tmp_path: Path) -> None:
    case = Case("none", lm, "base", "corpus.txt", 1, 1, "fp32", rows=2, length=4, each=1, pairs=1)
    assert not read_pretrain_settings(case.run(tmp_path), "benchmark").packs_apart


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_products_are_counted_forward_and_backward(attention: str) -> None:
    width, inner, length, rows, vocabulary = 32, 64, 8, 3, 50
    sizes = {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(vocab_size=vocabulary, attn_implementation=attention, **sizes)
    model, ids = BertForMaskedLM(config), torch.randint(vocabulary, (rows, length))
    with Products() as products:
        model(input_ids=ids, labels=ids).loss.backward()
    dense = 2 * (4 * width**2 + 2 * width * inner) + width**2 + width * vocabulary
    attended = 2 * 2 * length * width  # scores and sums, of two layers
    assert products.flops == 6 * rows * length * (dense + attended)
    assert products.seconds() > 0


def test_model_flops_of_roberta_base_are_as_published(tmp_path: Path) -> None:
    """At 50% of an H100's 989 TFLOP/s and sequence 512, with the head on 15% of tokens: 823k tokens/s."""
    RobertaConfig(**SHAPES[0].known.config).save_pretrained(tmp_path / "base")
    case = Case("none", "masked", str(tmp_path), "", 1, 1, "bf16", rows=8, length=512, each=1, pairs=1)
    assert 0.5 * 989e12 * case.tokens / step_flops(case, 0.15 * case.tokens) == pytest.approx(823e3, rel=0.01)


def counted(case: Case, folder: Path, port: int) -> None:
    """A training of nothing: each step's loss is its number."""
    gate = Gate(port, case, lambda: 7.0)
    while True:
        gate.losses[gate.steps + 1] = gate.steps + 1.0
        gate.step()


def fails(case: Case, folder: Path, port: int) -> None:
    raise SystemExit("a reason")


def test_a_side_trains_its_turns_and_no_more(tmp_path: Path) -> None:
    case = Case("none", "masked", str(tmp_path), "", 0, 2, "fp32", rows=2, length=4, each=3, pairs=2)
    side = Side(counted, case, tmp_path / "side", "fork")
    try:
        took = [side.turn() for _ in range(case.pairs)]
        assert side.measured() == 7.0
        assert side.end() == {step: float(step) for step in range(1, case.steps + 1)}
    finally:
        side.kill()
    assert min(took) > 0 and side.peak_mb > 0


def test_a_rank_that_fails_at_its_start_says_why(tmp_path: Path) -> None:
    case = Case("none", "masked", str(tmp_path), "", 0, 1, "fp32", rows=2, length=4, each=3, pairs=2)
    with pytest.raises(RuntimeError, match="a reason"):
        Side(fails, case, tmp_path / "side", "fork")


def test_it_says_what_it_takes() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "training.py"), "--help"]
    told = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout
    assert "--only" in told and "gpu-on-cpu" not in told
