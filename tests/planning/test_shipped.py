"""The shipped ds_configs are those of the planner's regimes, and their README says what the planner says of them."""

from __future__ import annotations

import pytest
from processes import ROOT
from shipped_plans import RANKS, README, cells, figures

from recyclable import machine

FILES = sorted(path.stem for path in (ROOT / "ds_configs").glob("*.json"))


@pytest.mark.parametrize("name", RANKS)
def test_the_readme_says_what_the_planner_says(name: str):
    (card, *told), (least, *found) = cells(name), figures(name)
    assert told == found and card.startswith(f"{least}")


def test_every_file_is_in_the_readme_and_every_file_for_gpus_is_planned():
    assert {name for name in FILES if not name.startswith("cpu")} == set(RANKS)
    assert all(f"`{name}.json`" in README.read_text() for name in FILES)


@pytest.mark.parametrize("name", RANKS)
def test_names_say_what_files_do_and_runs_take_them(name: str):
    ds_config = machine.load_ds_config(name)
    zero = ds_config["zero_optimization"]
    assert f"zero{zero['stage']}" in name and ("checkpointing" in name) == machine.recomputes(ds_config)
    home = "cpu" if "offload" in name else "nvme" if "nvme" in name else None
    assert all(zero.get(section, {}).get("device") == home for section in ("offload_optimizer", "offload_param"))
    batch = 2 * RANKS[name] * ds_config["train_micro_batch_size_per_gpu"]
    merged = machine.merge(
        ds_config, where=name, train_batch_size=batch, max_grad_norm=1.0, world_size=RANKS[name], on_cpu=False
    )
    assert merged["gradient_accumulation_steps"] == 2
