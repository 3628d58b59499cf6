"""Two ranks of one host: one compares the bytes of a packed corpus, the other opens what has been found right."""

from __future__ import annotations

import json
from typing import Any

import pytest
from language_models import save_tiny, short_texts
from processes import finish, start

PACKED = ["ids.bin", "starts.bin"]
RUNS = ("fresh", "again", "damaged")


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What each rank of each run found, and the lines of all."""
    folder = tmp_path_factory.mktemp("text")
    short_texts(folder / "text.txt", documents=60)
    config = {"base": str(save_tiny("gpt2", folder / "base")), "corpus": str(folder / "text.txt"), "out": "out"}
    config |= {"max_steps": 1, "train_batch_size": 2, "max_length": 24, "learning_rate": 1e-3}
    runs = [{"config": config, "flip": name == "damaged", "told": folder / name} for name in RUNS]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
        process = start(folder / "runs", runs, 2, "text_ranks.py")
    finish(process, folder / "runs")
    found = {name: [json.loads((folder / f"{name}-{rank}.json").read_text()) for rank in (0, 1)] for name in RUNS}
    return {**found, "lines": (folder / "runs" / "log").read_text().splitlines()}


@pytest.mark.parametrize("run", RUNS)
def test_one_rank_compares_all_bytes_and_both_have_the_same(told: dict[str, Any], run: str) -> None:
    first, second = told[run]
    assert set(first["read"]) == set(PACKED) and second["read"] == []
    assert (first["digest"], first["rows"]) == (second["digest"], second["rows"])


def test_what_is_damaged_is_told_once_and_no_rank_has_it(told: dict[str, Any]) -> None:
    assert len([line for line in told["lines"] if "a packed corpus is damaged and is made anew" in line]) == 1
    assert told["damaged"][1]["rows"] == told["fresh"][0]["rows"] != []
