"""A study end to end on a tiny chain: every cell once, settings chosen on the seed apart, restarts, several jobs."""

from __future__ import annotations

import fcntl
import json
from pathlib import Path

import pandas as pd
import pytest
import yaml
from worlds import make_base, make_corpus, make_task

from recyclable.cli import main
from recyclable.config.run_file import load_config
from recyclable.errors import InputError
from recyclable.recipes import study as study_module
from recyclable.recipes.study_plan import plan
from recyclable.recipes.study_settings import StudySettings
from recyclable.weights.manifest import read_manifest


@pytest.fixture(scope="module")
def content(tmp_path_factory) -> dict:
    """A study of one upgrade, one task, two methods, two reported seeds and a choice of two learning rates."""
    folder = tmp_path_factory.mktemp("world")
    make_base(folder / "base"), make_corpus(folder / "corpus"), make_task(folder / "task")
    train = {"train_batch_size": 8, "max_length": 32, "save_every": 0}
    return {
        "out": str(folder / "study"),
        "bases": {
            "M0": {"path": str(folder / "base")},
            "M1": {"parent": "M0", "corpus": {"train": str(folder / "corpus")}},
        },
        "tasks": {"three": str(folder / "task")},
        "edges": [{"old": "M0", "new": "M1", "tuning": ["full"]}],
        "seeds": [1, 2],
        "selection_seed": 9,
        "pretrain": {**train, "max_steps": 3, "learning_rate": 1e-3},
        "tune": {**train, "max_steps": 6, "learning_rate": 1e-2, "eval_every": 3},
        "experiments": {
            "few": {
                "shots": 4,
                "recycle": {**train, "max_steps": 3, "eval_every": 1},
                "methods": {
                    "apply": {},
                    "scratch": {"settings": [{"learning_rate": 1e-9}, {"learning_rate": 1e-2}]},
                    "both": {"settings": [{"learning_rate": 1e-3, "alpha": 0.5}]},
                },
            }
        },
    }


@pytest.fixture(scope="module")
def finished(content, tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("file") / "study.yaml"
    file.write_text(yaml.safe_dump(content))
    assert main(["study", str(file)]) == 0
    return file


def test_every_cell_is_finished_and_reported(content, finished):
    out = Path(content["out"])
    tidy = pd.read_csv(out / "results.csv")
    # 3 tunings, 2 candidates of scratch, and 2 seeds of apply, scratch and both
    assert len(tidy) == 3 + 2 + 6
    assert sorted(tidy[tidy.reported & (tidy.experiment == "few")].seed.unique()) == [1, 2]
    assert (out / "bases" / "M1" / "lineage.json").is_file()
    assert (out / "summary.md").is_file() and (out / "curves.png").is_file()


def test_the_reported_setting_is_the_best_on_the_selection_seeds_dev_set(content, finished):
    out = Path(content["out"]) / "few" / "M0-M1" / "three" / "full" / "scratch"
    scores = [read_manifest(out / f"seed9-setting{i}").metrics["dev"]["accuracy"] for i in range(2)]
    best = scores.index(max(scores))
    rates = [setting["learning_rate"] for setting in content["experiments"]["few"]["methods"]["scratch"]["settings"]]
    for seed in (1, 2):
        assert read_manifest(out / f"seed{seed}").settings["learning_rate"] == rates[best]


def test_scratch_is_compared_on_the_shots_of_the_same_seed(content, finished):
    out = Path(content["out"]) / "few" / "M0-M1" / "three" / "full"
    for method in ("scratch", "both", "apply"):
        assert read_manifest(out / method / "seed1").settings["shots"] == 4
        assert read_manifest(out / method / "seed1").settings["seed"] == 1


def test_a_restart_runs_only_what_is_missing(content, finished):
    out = Path(content["out"])
    kept = {path: path.stat().st_mtime_ns for path in out.rglob("manifest.json")}
    lost = out / "few" / "M0-M1" / "three" / "full" / "both" / "seed2" / "manifest.json"
    before = json.loads(lost.read_text())
    lost.unlink()
    assert main(["study", str(finished)]) == 0
    again = json.loads(lost.read_text())
    assert {path for path, time in kept.items() if path.stat().st_mtime_ns != time} == {lost}
    before["metrics"].pop("seconds"), again["metrics"].pop("seconds")
    assert again["files"] == before["files"] and again["metrics"] == before["metrics"]


def test_project_learns_from_the_other_tasks_tuned_on_both_bases(content):
    methods = {"project": {"settings": [{"project_rank": 4}]}}
    few = {**content["experiments"]["few"], "recycle": {"max_length": 32}, "methods": methods, "tasks": ["three"]}
    tasks = dict.fromkeys(("three", "four", "five"), content["tasks"]["three"])
    config = StudySettings.model_validate({**content, "tasks": tasks, "experiments": {"few": few}})
    cells = {cell.name: cell for cell in plan(config)}
    cell, out = cells["few/M0-M1/three/full/project/seed2"], Path(content["out"])
    known = [[f"tuned/{base}/{task}/full/seed2" for base in ("M0", "M1")] for task in ("four", "five")]
    assert cell.config().project_from == [tuple(str(out / name) for name in pair) for pair in known]
    assert set(cell.depends) == {"bases/M1", "tuned/M0/three/full/seed2", *known[0], *known[1]}
    order = list(cells)
    assert all(order.index(name) < order.index(cell.name) for name in cell.depends)


def test_an_experiment_may_be_run_on_some_edges_alone(content):
    few, edge = content["experiments"]["few"], content["edges"][0]
    bases = {**content["bases"], "M2": {**content["bases"]["M1"], "parent": "M1"}}
    last = {"shots": 4, "edges": ["M0-M2"], "methods": {"project": {}}}
    edges = [edge, {**edge, "new": "M2"}]
    tasks = dict.fromkeys(("three", "four"), content["tasks"]["three"])
    changed = {"bases": bases, "edges": edges, "tasks": tasks, "experiments": {"few": few, "last": last}}
    cells = [cell.name for cell in plan(StudySettings.model_validate({**content, **changed}))]
    assert {name.split("/")[1] for name in cells if name.startswith("last/")} == {"M0-M2"}
    assert {name.split("/")[1] for name in cells if name.startswith("few/")} == {"M0-M1", "M0-M2"}
    assert {name.split("/")[1] for name in cells if name.startswith("tuned/")} == {"M0", "M2"}


def test_a_cell_that_another_job_holds_is_left_to_it(content, finished, tmp_path):
    config = load_config(StudySettings, finished).model_copy(update={"out": tmp_path})
    cells = [cell for cell in plan(config) if cell.name.startswith("tuned/")]
    free = [cell for cell in cells if not cell.depends]
    with study_module._taken(tmp_path, free) as first:
        assert first == free[0].name
        with study_module._taken(tmp_path, free) as second:
            assert second == free[1].name
    lock = next((tmp_path / ".locks").iterdir()).open("w")
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # released when the holder is done


def test_a_cell_waits_for_what_it_depends_on(content, finished, tmp_path):
    config = load_config(StudySettings, finished).model_copy(update={"out": tmp_path})
    waiting = [cell for cell in plan(config) if cell.name.startswith(("few/", "tuned/"))]
    few = [cell for cell in waiting if cell.name.startswith("few/")]
    with study_module._taken(tmp_path, few) as name:
        assert name == few[0].name  # nothing it depends on is in the list
    with study_module._taken(tmp_path, waiting) as name:
        assert name.startswith("tuned/")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"selection_seed": None}, "selection_seed: missing"),
        ({"selection_seed": 1}, "is also one of the reported seeds"),
        ({"edges": [{"old": "M0", "new": "M7"}]}, "'M7' is not one of bases"),
        ({"experiments": {"few": {"methods": {}, "tasks": ["four"]}}}, "experiments.few: 'four' is not one of tasks"),
        ({"experiments": {"few": {"methods": {}, "edges": ["M1-M0"]}}}, "few: 'M1-M0' is not one of edges"),
        ({"bases": {"M0": {}, "M1": {"path": "x"}}}, "needs either `path`, or `parent` and `corpus`"),
    ],
)
def test_a_study_that_does_not_hold_together_is_refused(content, tmp_path, change, message):
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump({**content, **change}))
    with pytest.raises(InputError, match=message):
        load_config(StudySettings, file)


def test_another_tasks_weights_are_tuned_and_recycled_for_the_tasks_that_want_them(content, tmp_path):
    tasks = {**content["tasks"], "next": content["tasks"]["three"]}
    methods = {
        "scratch": {"settings": [{"learning_rate": 1e-2}]},
        "interpolate": {"settings": [{"learning_rate": 1e-3}]},
    }
    few = {**content["experiments"]["few"], "methods": methods, "tasks": ["next"], "weights_from": {"next": "three"}}
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump({**content, "tasks": tasks, "experiments": {"few": few}}))
    cells = {cell.name: cell for cell in plan(load_config(StudySettings, file))}
    assert [name for name in cells if name.startswith("tuned/")] == [
        f"tuned/M0/three/full/seed{seed}" for seed in (1, 2, 9)
    ]
    assert {name.split("/")[2] for name in cells if name.startswith("few/")} == {"next"}
    cell = cells["few/M0-M1/next/full/interpolate/seed1"]
    assert "tuned/M0/three/full/seed1" in cell.depends
    assert cell.config().weights.endswith("tuned/M0/three/full/seed1") and cell.config().related_task is True


def test_a_wrong_setting_of_any_cell_is_found_before_the_first_one_runs(content, tmp_path, capsys):
    content = {**content, "out": str(tmp_path / "study"), "tune": {**content["tune"], "learning_rat": 1}}
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(content))
    assert main(["study", str(file)]) == 2
    assert "unknown key 'learning_rat', did you mean 'learning_rate'?" in capsys.readouterr().err
    assert not (tmp_path / "study").exists()
