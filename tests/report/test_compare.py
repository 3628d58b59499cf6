"""Comparison rows: the target is scratch's best dev score, and the step that first reaches it."""

from __future__ import annotations

from pathlib import Path

import pytest
from records import run

from recyclable.errors import InputError
from recyclable.report.compare import compare, plot, require_plottable, steps_to_target, table


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


def test_runs_without_a_curve_of_their_metric_are_left_out(tmp_path):
    pytest.importorskip("matplotlib")
    bare = {**run("init", [0.1, 0.9]), "history": [{"step": 0}, {"step": 10}]}
    empty = {"method": "init", "metrics": {}, "history": []}
    assert steps_to_target(bare, 0.5) is None
    for name, panel in {"some": {"a": [bare], "b": [run("scratch", [0.1, 0.3])]}, "none": {"c": [empty]}}.items():
        plot({name: panel}, tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("place", ["/nope/x.png", "/proc/x.png", "{tmp}/x.foo", "{tmp}/x", "{tmp}/folder.png"])
def test_a_plot_that_cannot_be_written_is_refused_before(place, tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(InputError, match=r"^--plot: .*, expected a "):
        require_plottable(Path(place.replace("{tmp}", str(tmp_path))), "--plot")
    require_plottable(tmp_path / "x.png", "--plot")
    assert list(tmp_path.iterdir()) == [tmp_path / "folder.png"]
