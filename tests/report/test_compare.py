"""Comparison rows: the target is scratch's best dev score, and the step that first reaches it."""

from __future__ import annotations

import pytest
from records import run

from recyclable.report.compare import compare, plot, steps_to_target, table


def test_the_first_evaluation_at_the_target_counts_not_a_later_one():
    assert steps_to_target(run("init", [0.1, 0.6, 0.4, 0.6]), 0.6) == 10


def test_a_target_that_is_never_reached_is_none():
    assert steps_to_target(run("init", [0.1, 0.2]), 0.21) is None


def test_every_run_is_measured_against_scratch_and_scratch_reaches_itself():
    rows = {
        row["method"]: row for row in compare({"a": run("scratch", [0.1, 0.3, 0.5, 0.4]), "b": run("init", [0.5, 0.6])})
    }
    assert rows["a"]["steps_to_target"] == 20
    assert rows["b"]["steps_to_target"] == 0
    assert rows["b"]["dev_best"] == 0.6
    assert rows["b"]["examples"] == 40


def test_without_scratch_there_is_no_target():
    assert compare({"a": run("init", [0.5])})[0]["steps_to_target"] is None


def test_the_table_has_a_line_per_row_and_a_dash_where_nothing_is_known():
    lines = table([{"method": "scratch", "test": 0.12345}, {"method": "apply", "test": None}]).splitlines()
    assert len(lines) == 4
    assert [cell.strip() for cell in lines[2].split("|")[1:3]] == ["scratch", "0.123"]
    assert [cell.strip() for cell in lines[3].split("|")[1:3]] == ["apply", "-"]
    assert len({len(line) for line in lines}) == 1


def test_the_plot_is_a_png_with_curves_and_levels(tmp_path):
    pytest.importorskip("matplotlib")
    panel = {"scratch": [run("scratch", [0.1, 0.3]), run("scratch", [0.2, 0.4])], "apply": [run("apply", [0.3])]}
    plot({"few": panel, "full": panel}, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
