"""`recyclable plan`: from a config alone to a ds_config that runs take, in lines and as JSON; bad input in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from recyclable import machine
from recyclable.cli import main

CONFIG = {
    **{"model_type": "bert", "architectures": ["BertForMaskedLM"], "vocab_size": 200, "hidden_size": 16},
    **{"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 64},
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path / "model"


def planned(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[list[str], dict[str, Any]]:
    assert main(["plan", *map(str, argv), "--json"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    return lines, json.loads(last)


def test_every_regime_is_told_and_the_chosen_one_is_a_ds_config_that_a_run_takes(model, tmp_path, capsys):
    out = tmp_path / "ds.json"
    lines, found = planned(capsys, "--model", model, "--devices", 4, "--device", "l4", "--out", out)
    assert found["model"]["parameters"] == found["model"]["trained"] > 0
    rows = {row["name"]: row for row in found["regimes"]}
    assert {(row["zero_stage"], row["checkpointing"]) for row in rows.values()} >= {
        (s, c) for s in range(4) for c in (0, 1)
    }
    assert {row["optimizer_on"] for row in rows.values()} == {"device", "cpu", "nvme"}
    assert all(any(line.startswith(f"{name} ") for line in lines) for name in rows)
    assert any(line.startswith(f"use {found['chosen']}: ") for line in lines)
    assert max(map(len, lines)) <= 120
    best = rows[found["chosen"]]
    assert best["fits"] and best["seconds_per_step"] == min(
        row["seconds_per_step"] for row in rows.values() if row["fits"]
    )
    written = json.loads(out.read_text())
    assert written == found["ds_config"]
    batch = found["run"]["train_batch_size"]
    merged = machine.merge(written, where=out, train_batch_size=batch, max_grad_norm=1.0, world_size=4, on_cpu=False)
    assert merged["train_micro_batch_size_per_gpu"] == best["micro_batch"]


def test_a_run_config_says_what_is_planned_though_its_files_are_not_there(model, tmp_path, capsys):
    run = tmp_path / "run.yaml"
    run.write_text(f"base: {model}\ntask: nowhere/\nout: none\nmax_steps: 5\nlearning_rate: 1e-4\nmax_length: 32\n")
    machines = ("--devices", 2, "--device", "h100", "--host-memory", "1TB", "--deepspeed_config", "1b_zero2")
    _, found = planned(capsys, run, "tuning=lora", "train_batch_size=16", *machines)
    assert found["model"]["trained"] < found["model"]["parameters"] / 2
    assert [row["name"] for row in found["regimes"]] == ["1b_zero2"] and found["regimes"][0]["micro_batch"] == 8
    assert any("2 labels" in line for line in found["assumed"]) and found["run"]["max_length"] == 32


def test_what_takes_more_than_there_is_does_not_fit_and_nothing_is_written(model, tmp_path, capsys):
    argv = [
        "plan",
        "--model",
        str(model),
        "--device",
        "h100",
        "--device-memory",
        "1MB",
        "--deepspeed_config",
        "7b_zero3",
    ]
    assert main([*argv, "--out", str(tmp_path / "ds.json")]) == 2
    assert "nothing fits" in (told := capsys.readouterr()).out and "nothing fits" in told.err
    assert not (tmp_path / "ds.json").exists()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--device", "h1000"], ["--device", "'h1000'", "h100"]),
        (["--devices", "0"], ["devices", "0"]),
        (["--devices", "1000000000000"], ["devices", "1048576"]),
        (["--device-memory", "lots", "--device", "h100"], ["--device-memory", "'lots'", "80GB"]),
        (["--devices", "3", "--hosts", "2", "--device", "h100"], ["--hosts", "2", "3"]),
        (["--device", "h100", "--devices", "3", "train_batch_size=8"], ["train_batch_size", "8", "3"]),
        (["--device", "h100", "max_length=4096"], ["max_length", "4096", "64"]),
        (["--device", "h100", "nothing_reads=1"], ["nothing_reads"]),
        (["--device", "h100", "--verb", "recycle", "method=apply"], ["method", "apply", "nothing"]),
        (["--device", "cpu", "logits=bf16"], ["logits", "bf16", "float32"]),
        (["--device", "h100", "--deepspeed_config", "cpu", "logits=bf16"], ["logits", "bf16", "float32"]),
        (["--device", "cpu", "--scale", "logits=bf16"], ["logits", "bf16", "float32"]),
    ],
)
def test_bad_input_is_one_line_and_status_2(model, capsys, argv, words):
    assert main(["plan", "--model", str(model), *argv]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and all(word in error for word in words)


@pytest.mark.parametrize("where", [["h100"], ["cpu", "--deepspeed_config", "cpu_autocast"]])
def test_logits_in_bf16_are_planned_where_the_model_computes_in_it(model, capsys, where):
    _, found = planned(capsys, "--model", model, "--device", *where, "logits=bf16", "max_length=32")
    assert found["regimes"]


def test_a_model_that_is_none_is_refused(tmp_path, capsys):
    assert main(["plan", "--model", str(tmp_path / "none"), "--device", "h100"]) == 2
    assert main(["plan", "--model", str(tmp_path), "--device", "h100"]) == 2
    assert main(["plan", "--device", "h100"]) == 2
    assert capsys.readouterr().err.count("\n") == 3


def test_of_a_hub_name_nothing_but_its_config_is_fetched(model, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        lambda name, allow_patterns: asked.append((name, tuple(allow_patterns))) or model,
    )
    _, found = planned(capsys, "--model", "some/name", "--device", "h100", "--deepspeed_config", "125m_zero1")
    assert found["model"]["name"] == "some/name" and set(asked) == {("some/name", ("config.json",))}


def test_a_hub_that_does_not_answer_is_one_line(monkeypatch, capsys):
    def gone(name: str, allow_patterns: list[str]) -> str:
        raise OSError("no way there")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", gone)
    assert main(["plan", "--model", "some/name", "--device", "h100"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "some/name" in error and "hub" in error


def test_a_teachers_cached_answers_may_be_those_of_every_layer(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": 6}))
    run = ["--verb", "recycle", "method=both", "task=none", "teacher=cached", "beta=1.0", "max_length=32"]
    argv = ["--model", tmp_path, "--device", "h100", "--deepspeed_config", "125m_zero1", *run]
    _, found = planned(capsys, *argv)
    assert found["chosen"] == "125m_zero1" and "Distillation" in found["run"]["objective"]


LLAMA = {**CONFIG, "model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_key_value_heads": 2}
T5 = {
    **{"model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "vocab_size": 200, "d_model": 16},
    **{"d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0},
}


@pytest.mark.parametrize(
    ("config", "problem", "objective"),
    [
        (CONFIG, "tokens", "Distillation"),
        (LLAMA, "generation", "TokenDistillation"),
        (T5, "classification", "Distillation"),
        (T5, "generation", "TokenDistillation"),
    ],
)
def test_distillation_of_hidden_states_is_planned_for_every_kind_of_task(tmp_path, capsys, config, problem, objective):
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "task").mkdir()
    (tmp_path / "task" / "task.yaml").write_text(f"problem: {problem}\n")
    run = ["method=both", f"task={tmp_path / 'task'}", "beta=1.0", "max_length=32"]
    _, found = planned(capsys, "--model", tmp_path, "--device", "h100", "--deepspeed_config", "125m_zero1", *run)
    assert found["run"]["objective"] == objective and found["regimes"][0]["fits"]


def test_a_kept_answer_over_a_vocabulary_is_refused_as_a_run_refuses_it(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    argv = ["plan", "--model", str(tmp_path), "--device", "h100", "method=both", "teacher=cached"]
    assert main(argv) == 2
    assert "teacher: is cached, expected online" in capsys.readouterr().err


def test_a_cached_teacher_is_told_though_it_is_gone_when_the_student_trains(model, capsys):
    run = ["--verb", "recycle", "method=distill", "task=none", "max_length=16"]
    _, found = planned(capsys, "--model", model, "--device", "h100", "--deepspeed_config", "125m_zero1", *run)
    assert found["model"]["teacher"] == found["model"]["parameters"] > 0
    assert found["regimes"][0]["memory"]["teacher"] == 0 and found["regimes"][0]["phase"] != "teaching"
