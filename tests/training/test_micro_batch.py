"""A micro-batch that nobody named: found, tried, and nothing that is learned differs for it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from faults import write_checkpoint
from language_models import save_tiny, short_texts
from processes import STAGE_3, finish, outcome, start

from recyclable.planning.trace import Untraceable
from recyclable.training import micro_batch
from recyclable.training.checkpoint.choosing import known_micro_batch
from recyclable.training.checkpoint.record import MARK, read_record, write_record

STAGES = (0, 1, 2, 3)
SHARE = 4
SETTINGS = SimpleNamespace(gradient_checkpointing=None, eval_batch_size=8, writes_checkpoints=False)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("micro")
    short_texts(folder / "text.txt", documents=150)
    save_tiny("gpt2", folder / "base")
    runs = []
    for stage in STAGES:
        machine = {"zero_optimization": {"stage": stage, **(STAGE_3 if stage == 3 else {})}}
        runs += [
            {"config": config(folder, f"{stage}-{name}"), "ds_config": machine, **how}
            for name, how in (
                ("untried", {}),
                ("tried", {"short": True}),
                ("small", {"short": True, "room": 1000}),
                ("named", {"like": folder / f"{stage}-small"}),
            )
        ]
    runs.append({"config": config(folder, "fails"), "ds_config": machine, "short": True, "fails": True})
    finish(start(folder / "runs", runs, nproc=2, script="micro_batch_ranks.py"), folder / "runs")
    return folder


def config(folder: Path, out: str) -> dict[str, Any]:
    return {
        **{"base": str(folder / "base"), "corpus": str(folder / "text.txt"), "out": folder / out, "dropout": 0.1},
        **{"max_steps": 3, "train_batch_size": 2 * SHARE, "max_length": 24, "learning_rate": 2e-3, "save_every": 0},
    }


def learned(out: Path) -> tuple[str, Any]:
    record = json.loads((out / "lineage.json").read_text())
    return hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest(), record["heldout"]


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_whose_micro_batch_was_tried_first_ends_with_the_bytes_of_one_whose_was_not(world: Path, stage: int):
    assert outcome(world / f"{stage}-untried") == {"found": None, "message": None}
    assert outcome(world / f"{stage}-tried") == {"found": SHARE, "message": None}
    assert learned(world / f"{stage}-tried") == learned(world / f"{stage}-untried")


@pytest.mark.parametrize("stage", STAGES)
def test_with_accumulation_too(world: Path, stage: int):
    assert outcome(world / f"{stage}-small") == {"found": 1, "message": None}
    assert learned(world / f"{stage}-small") == learned(world / f"{stage}-named")


def test_what_was_found_is_told_in_a_line_with_what_it_takes(world: Path):
    log = (world / "runs" / "log").read_text()
    assert f"micro-batch: {SHARE} of {SHARE} examples, " in log
    assert "micro-batch: 1 of 4 examples" in log and "hardly fits" in log


def test_one_that_does_not_fit_after_all_names_a_smaller_one_and_leaves_nothing(world: Path):
    message = outcome(world / "fails")["message"]
    assert f"put train_micro_batch_size_per_gpu {SHARE // 2} into the ds_config" in message
    assert not (world / "fails").exists()


def test_a_run_that_is_resumed_keeps_the_micro_batch_it_was_started_with(tmp_path: Path):
    assert known_micro_batch(tmp_path) is None
    write_checkpoint(tmp_path, 2)
    newest = write_checkpoint(tmp_path, 4)
    record = read_record(newest)
    write_record(newest, dataclasses.replace(record, micro_batch=record.micro_batch + 1))
    assert known_micro_batch(tmp_path) == record.micro_batch + 1
    (newest / MARK).unlink()
    assert known_micro_batch(tmp_path) == record.micro_batch  # of the one before


def test_a_model_that_cannot_be_planned_is_trained_with_the_whole_share_and_a_line_says_so(monkeypatch, capsys):
    class Untold:
        def __init__(self, *_: Any, **__: Any) -> None: ...

        def largest(self, _: Any) -> Any:
            raise Untraceable("ValueError: no values")

    monkeypatch.setattr(micro_batch, "Fitter", Untold)
    assert micro_batch._planned(None, None, SETTINGS, {}, None, 4) is None
    assert "notice: no plan of the memory could be made (ValueError: no values)" in capsys.readouterr().out


def test_a_mistake_of_the_planner_is_no_notice(monkeypatch):
    mistaken = SimpleNamespace(largest=lambda ds_config: ds_config["no"])
    monkeypatch.setattr(micro_batch, "Fitter", lambda *_, **__: mistaken)
    with pytest.raises(KeyError):
        micro_batch._planned(None, None, SETTINGS, {}, None, 4)
