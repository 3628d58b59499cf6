"""Two ranks of one host: one compares the bytes of a packed corpus that both have, and each those of one of its own."""

from __future__ import annotations

import json
from typing import Any

import pytest
from language_models import save_tiny, short_texts
from processes import finish, start

PACKED = ["ids.bin", "starts.bin"]
SHARED = {"fresh": None, "again": None, "damaged": 0}
"""Runs on one cache, and the rank that damages it first."""
APART = {"apart": None, "apart-again": None, "apart-damaged": 1}
"""Runs of which each rank has a cache of its own."""


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What each rank of each run found, and the lines of all."""
    folder = tmp_path_factory.mktemp("text")
    short_texts(folder / "text.txt", documents=60)
    config = {"base": str(save_tiny("gpt2", folder / "base")), "corpus": str(folder / "text.txt"), "out": "out"}
    config |= {"max_steps": 1, "train_batch_size": 2, "max_length": 24, "learning_rate": 1e-3}
    runs = [
        {"config": config, "cache": folder / cache, "flip": flip, "told": folder / name}
        for cache, named in (("cache", SHARED), ("cache-{rank}", APART))
        for name, flip in named.items()
    ]
    finish(start(folder / "runs", runs, 2, "text_ranks.py"), folder / "runs")
    names = [*SHARED, *APART]
    found = {name: [json.loads((folder / f"{name}-{rank}.json").read_text()) for rank in (0, 1)] for name in names}
    return {**found, "lines": (folder / "runs" / "log").read_text().splitlines()}


@pytest.mark.parametrize("run", SHARED)
def test_one_rank_compares_all_bytes_and_both_have_the_same(told: dict[str, Any], run: str) -> None:
    first, second = told[run]
    assert set(first["read"]) == set(PACKED) and second["read"] == []
    assert (first["digest"], first["rows"]) == (second["digest"], second["rows"])


@pytest.mark.parametrize("run", APART)
def test_ranks_with_caches_of_their_own_believe_no_other(told: dict[str, Any], run: str) -> None:
    for rank in told[run]:
        assert set(rank["read"]) == set(PACKED)
        assert rank["rows"] == told["fresh"][0]["rows"]


def test_what_is_damaged_is_told_once_and_no_rank_has_it(told: dict[str, Any]) -> None:
    notices = [line for line in told["lines"] if "a packed corpus is damaged and is made anew" in line]
    assert [("/cache/" in line, "/cache-1/" in line) for line in notices] == [(True, False), (False, True)]
    assert told["damaged"][1]["rows"] == told["fresh"][0]["rows"] != []
