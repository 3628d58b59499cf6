"""Pre-training a decoder with old text, and an encoder-decoder, goes on after a fault as if nothing had happened."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from language_models import save_tiny, short_texts
from processes import finish, outcome, start

FAMILIES = {"gpt2": {"replay": True}, "t5": {}}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resuming")
    short_texts(folder / "new.txt", documents=200)
    short_texts(folder / "old.txt", documents=100, first=30)
    short_texts(folder / "other.txt", documents=200, first=7)
    runs = []
    for family, settings in FAMILIES.items():
        save_tiny(family, folder / family)
        others = [str(folder / name) for name in ("new.txt", "other.txt")]
        changed = {"outcome": f"{folder / family}-changed", "replace": others}
        cases = [("whole", {}), ("broken", {"raise_at": 5}), ("broken", {"resume": True, **changed})]
        for out, how in (*cases, ("broken", {"resume": True})):
            run = {"verb": "pretrain", "config": config(folder, family, out, settings), **how}
            runs.append({**run, "ds_config": {"zero_optimization": {"stage": 1}}})
    runs += with_another_teacher(folder)
    finish(start(folder / "runs", runs), folder / "runs")
    return folder


def config(folder: Path, family: str, out: str, settings: dict[str, Any]) -> dict[str, Any]:
    replay = {"corpus": str(folder / "old.txt"), "share": 0.25}
    return {
        **{"base": str(folder / family), "corpus": str(folder / "new.txt"), "out": folder / f"{family}-{out}"},
        **{"max_steps": 8, "train_batch_size": 6, "max_length": 24, "learning_rate": 2e-3, "eval_every": 4},
        **{"save_every": 2, "dropout": 0.1, **({"replay": replay} if settings else {})},
    }


def with_another_teacher(folder: Path) -> list[dict[str, Any]]:
    """A run that a teacher teaches breaks off, and another one of its kind is in its place."""
    teachers = [str(folder / name) for name in ("teacher", "other-teacher")]
    for name, seed in zip(teachers, (5, 6), strict=True):
        save_tiny("gpt2", Path(name), seed=seed)
    taught = {**config(folder, "gpt2", "taught", {}), "teacher": teachers[0]}
    run = {"verb": "pretrain", "config": taught, "ds_config": {}}
    changed = {"resume": True, "outcome": folder / "other-teacher-outcome", "replace": teachers}
    return [{**run, "raise_at": 5}, {**run, **changed}]


def test_with_another_teacher_in_the_place_of_its_own_it_does_not_go_on(world: Path) -> None:
    ended = outcome(world / "other-teacher-outcome")
    assert ended["error"] == "InputError"
    assert ended["message"].startswith(f"teacher: is not what the run in {world / 'gpt2-taught'} began with: digest ")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_that_broke_off_ends_with_the_bytes_of_one_that_did_not(world: Path, family: str) -> None:
    whole, broken = world / f"{family}-whole", world / f"{family}-broken"
    assert outcome(whole) == outcome(broken) == {}
    weights = [hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest() for out in (whole, broken)]
    assert weights[0] == weights[1]
    records = [json.loads((out / "lineage.json").read_text()) for out in (whole, broken)]
    told = ["heldout", "heldout_replay"] if family == "gpt2" else ["heldout"]
    assert [records[0][key] for key in told] == [records[1][key] for key in told]


@pytest.mark.parametrize("family", FAMILIES)
def test_with_another_text_in_the_place_of_its_corpus_it_does_not_go_on(world: Path, family: str) -> None:
    ended = outcome(world / f"{family}-changed")
    assert ended["error"] == "InputError"
    assert ended["message"].startswith(f"corpus: is not what the run in {world / family}-broken began with: digest ")
