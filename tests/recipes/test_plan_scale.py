"""`recyclable plan --scale`: figures that hang together, what is right for any figures, and bad input in one line."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import transformers

import recyclable
from recyclable.architectures.structure import on_meta
from recyclable.cli import main
from recyclable.planning import devices
from recyclable.planning.devices import Device
from recyclable.planning.known import KNOWN

TINY = {
    **{"model_type": "bert", "architectures": ["BertForMaskedLM"], "vocab_size": 200, "hidden_size": 32},
    **{"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "max_position_embeddings": 64},
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(TINY))
    return tmp_path / "model"


def scaled(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[list[str], dict[str, Any]]:
    assert main(["plan", "--scale", *map(str, argv), "--json"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    return lines, json.loads(last)


@pytest.mark.parametrize("size", KNOWN)
def test_known_sizes_have_as_many_parameters_as_they_are_called_by(size: str):
    known = KNOWN[size]
    config = transformers.AutoConfig.for_model(**known.config)
    causal = known.config["architectures"][0].endswith("CausalLM") or known.config["model_type"] == "gpt2"
    auto_class = transformers.AutoModelForCausalLM if causal else transformers.AutoModelForMaskedLM
    count = sum(parameter.numel() for parameter in on_meta(config, auto_class).parameters())
    assert count == pytest.approx(float(size[:-1]) * {"M": 1e6, "B": 1e9}[size[-1]], rel=0.05)
    assert known.length <= config.max_position_embeddings


def test_devices_double_figures_hang_together_and_assumptions_are_told(model: Path, tmp_path: Path, capsys):
    plot = tmp_path / "scale.png"
    lines, found = scaled(capsys, "--model", model, "--device", "h100", "--out", plot)
    rows = found["rows"]
    assert [(row["devices"], row["hosts"]) for row in rows] == [(8 * 2**n, 2**n) for n in range(8)]
    for row in rows:
        assert row["fits"] and row["device_bytes"] < 80e9
        assert row["tokens_per_step"] == 16_384 * row["devices"]
        assert row["seconds_per_step"] == pytest.approx(sum(row["seconds"].values()))
        assert row["tokens_per_s"] == pytest.approx(row["tokens_per_step"] / row["seconds_per_step"])
        days = row["seconds_per_step"] / row["tokens_per_step"] * 1e9 * row["devices"] / 86_400
        assert row["device_days_per_billion_tokens"] == pytest.approx(days)
        assert 0 < row["mfu"] < 0.4
    # the same work on each device, and more to say: no step is shorter, no device does more
    assert all(more["seconds_per_step"] >= less["seconds_per_step"] for less, more in pairwise(rows))
    assert all(more["efficiency"] <= less["efficiency"] <= 1 for less, more in pairwise(rows))
    assert all(more["tokens_per_s"] > less["tokens_per_s"] for less, more in pairwise(rows))
    told = "\n".join(line for line in lines if line.startswith("assumed: "))
    for word in ("40% of 989 TFLOP/s", "450 GB/s", "8 x 50 GB/s", "hides 50%", "256 x 64 tokens"):
        assert word in told
    assert plot.read_bytes().startswith(b"\x89PNG") and max(map(len, lines)) <= 120


def test_a_batch_of_all_devices_is_shared_out_by_those_that_divide_it(model: Path, capsys):
    argv = ("--model", model, "--device", "a100-80gb", "--devices", 64, "train_batch_size=96", "max_length=32")
    _, found = scaled(capsys, *argv)
    assert [row["devices"] for row in found["rows"]] == [8, 16, 32]
    assert {row["tokens_per_step"] for row in found["rows"]} == {96 * 32}
    arithmetic = [row["seconds"]["arithmetic"] for row in found["rows"]]
    assert arithmetic[0] == pytest.approx(4 * arithmetic[2], rel=0.05)  # rows of a mask take a few words more


def test_what_reaches_more_of_the_rate_is_quicker_by_as_much(model: Path):
    rows = [
        recyclable.plan(str(model), devices=8, device="h100", scale=True, mfu=share)["rows"][0] for share in (0.2, 0.6)
    ]
    assert rows[0]["seconds"]["arithmetic"] == pytest.approx(3 * rows[1]["seconds"]["arithmetic"])


def test_a_cpu_is_a_host_and_its_rates_are_those_measured(model: Path, monkeypatch: pytest.MonkeyPatch):
    here = Device("cpu", 8e9, 1e11, 1e10, 1e9, 1e10, 1.25e8, on_cpu=True)
    monkeypatch.setattr(devices, "this_cpu", lambda ranks: here)
    found = recyclable.plan(str(model), devices=16, device="cpu", scale=True)
    assert [(row["devices"], row["hosts"]) for row in found["rows"]] == [(8, 8), (16, 16)]
    assert any("0.1 TFLOP/s" in line for line in found["assumed"])


def test_a_model_too_large_for_few_devices_is_planned_for_many(capsys):
    where = ("--device", "h100", "--devices", 64, "--host-memory", "400GB")
    lines, found = scaled(capsys, "--model", "70B", *where, "--tokens-per-device", 4096)
    by_count = {row["devices"]: row for row in found["rows"]}
    assert not by_count[8]["fits"] and any("does not fit" in line for line in lines)
    assert by_count[64]["zero_stage"] == 3 and by_count[64]["parameters"] == pytest.approx(69e9, rel=0.01)
    first = next(row for row in found["rows"] if row["fits"])
    assert first["efficiency"] == 1 > by_count[64]["efficiency"]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--scale", "--mfu", "1.4"], ["mfu", "1.4"]),
        (["--tokens-per-device", "4096"], ["tokens_per_device", "without scale"]),
        (["--scale", "--out", "scale.txt"], ["--out", "scale.txt", ".png"]),
        (["--scale", "--devices", "7", "--hosts", "3"], ["--hosts", "3", "7 devices"]),
        (["--scale", "--tokens-per-device", "100000000000"], ["tokens", "1e+11", "16,777,216"]),
        (["--scale", "train_batch_size=16777216"], ["tokens", "on each of 8 devices", "16,777,216"]),
        (["--scale", "train_batch_size=12"], ["train_batch_size", "12", "8"]),
        (["--scale", "train_batch_size=0"], ["train_batch_size", "0", "greater than 0"]),
        (["--scale", "train_batch_size='12'"], ["train_batch_size", "12", "8"]),
    ],
)
def test_bad_input_is_one_line_and_status_2(model: Path, capsys, argv: list[str], words: list[str]):
    assert main(["plan", "--model", str(model), "--device", "h100", *argv]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and all(word in error for word in words)
