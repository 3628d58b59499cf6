"""The study's report: selection runs stay out of the tables, pairs are pairs, the interval is Student's."""

from __future__ import annotations

import math
import statistics

import pandas as pd
import pytest
from records import run

from recyclable.report.study_report import interval, paired_gains, results, summary, write_study_report


def record(method: str, seed: int, test: float, curve: list[float], reported: bool = True, new: str = "M1") -> dict:
    return {
        "experiment": "few_shot",
        "old": "M0",
        "new": new,
        "task": "chemprot",
        "tuning": "full",
        "method": method,
        "seed": seed,
        "setting": None,
        "reported": reported,
        "settings": {"learning_rate": 1e-4},
        "run": run(method, curve, test),
    }


RECORDS = [
    record("scratch", 20, 0.40, [0.1, 0.4]),
    record("scratch", 30, 0.44, [0.1, 0.5]),
    record("init", 20, 0.60, [0.4, 0.6]),
    record("init", 30, 0.54, [0.3, 0.45]),
    record("init", 10, 0.99, [0.9, 0.9], reported=False),
]


def test_targets_are_those_of_scratch_with_the_same_seed():
    rows = {(row["method"], row["seed"]): row for row in results(RECORDS)}
    assert rows["init", 20]["steps_to_target"] == 0
    assert rows["init", 30]["steps_to_target"] is None
    assert rows["init", 10]["steps_to_target"] is None and rows["init", 10]["target"] is None


def test_gains_pair_runs_by_seed_and_edge():
    other_edge = [record("scratch", 20, 0.1, [0.1], new="M2"), record("init", 20, 0.2, [0.1], new="M2")]
    rows = [row for row in results(RECORDS + other_edge) if row["reported"]]
    (gain,) = paired_gains(rows, "scratch")
    assert gain["pairs"] == 3
    assert gain["gain"] == pytest.approx((20 + 10 + 10) / 3)
    (loss,) = paired_gains(rows, "init")
    assert (loss["method"], loss["gain"]) == ("scratch", pytest.approx(-gain["gain"]))


def test_gains_of_other_metrics_are_no_gains_of_this_one():
    told = [{**record(method, 20, test, [0.1]), "task": "said"} for method, test in (("scratch", -3.0), ("init", -2.5))]
    for each in told:
        each["run"]["metrics"]["test"] = {"log_likelihood": each["run"]["metrics"]["test"]["accuracy"]}
        each["run"]["metrics"]["metric"] = "log_likelihood"
        each["run"]["history"] = []
    gains = paired_gains([row for row in results(RECORDS + told) if row["reported"]], "scratch")
    assert {(gain["metric"], gain["pairs"]) for gain in gains} == {("accuracy", 2), ("log_likelihood", 1)}
    assert next(g["gain"] for g in gains if g["metric"] == "log_likelihood") == pytest.approx(50)


def test_bases_and_what_models_forgot_stand_in_the_summary(tmp_path):
    told = [{**each, "texts": {"loss_general": 3.0 + each["seed"]}} for each in RECORDS[:2]]
    chain = [{"base": "M1", "parent": "M0", "before": 5.25, "after": 4.125, "loss_general": 3.5}]
    write_study_report(told, tmp_path, chain)
    text = (tmp_path / "summary.md").read_text()
    assert "| M1   | M0     | 5.250  | 4.125 | 3.500        |" in text and "28.000 ± 7.071" in text


def test_every_test_score_is_in_the_rows_and_the_summary():
    with_f1 = [record("init", 20, 0.6, [0.4]), record("init", 30, 0.5, [0.4])]
    for each, f1 in zip(with_f1, (0.3, 0.5), strict=True):
        each["run"]["metrics"]["test"]["f1_macro"] = f1
    rows = results(with_f1)
    assert [row["test_f1_macro"] for row in rows] == [0.3, 0.5]
    (line,) = summary(rows)
    assert (line["test"], line["test_f1_macro"]) == ("0.550 ± 0.071", "0.400 ± 0.141")


def test_summary_counts_runs_that_never_reach_the_target_and_takes_the_median_of_the_rest():
    lines = {line["method"]: line for line in summary([row for row in results(RECORDS) if row["reported"]])}
    assert (lines["init"]["runs"], lines["init"]["never"], lines["init"]["steps_to_target"]) == (2, 1, "0")
    assert lines["init"]["test"] == "0.570 ± 0.042"


def test_the_interval_is_students_for_three_values():
    values = [1.0, 2.0, 6.0]
    half = 4.302652729911275 * statistics.stdev(values) / math.sqrt(3)  # t table: 97.5%, 2 degrees of freedom
    assert interval(values) == pytest.approx((3 - half, 3 + half))
    assert interval([1.0]) == (None, None)


def test_the_report_writes_tidy_files_a_summary_and_a_plot(tmp_path):
    returned = write_study_report(RECORDS, tmp_path)
    tidy = pd.read_csv(tmp_path / "results.csv")
    assert len(tidy) == len(RECORDS) and tidy[tidy.reported].shape[0] == 4
    assert len(pd.read_csv(tmp_path / "curves.csv")) == sum(len(r["run"]["history"]) for r in RECORDS)
    text = (tmp_path / "summary.md").read_text()
    assert "0.570 ± 0.042" in text and "0.99" not in text
    assert (tmp_path / "curves.png").stat().st_size > 0
    assert returned["gains"]["few_shot"]["scratch"][0]["method"] == "init"
    assert returned["gains"]["few_shot"]["apply"] == [] and "against apply" not in text
