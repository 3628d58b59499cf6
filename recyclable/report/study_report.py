"""What a study found: a tidy file of all runs, tables of means and deviations, dev curves."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from recyclable.report.compare import Run, dev_best, plot, steps_to_target, table

Record = dict[str, Any]
"""experiment, old, new, task, tuning, method, seed, setting, reported; `settings`, `run` (its manifest) and `texts`
(`loss_<name>` of the study's texts)."""

RIVALS = ("scratch", "apply")
"""What every method is measured against: tuning the new base anew, and doing nothing to the outdated weights."""
_GROUP = ("experiment", "task", "tuning", "old", "new")


def write_study_report(records: list[Record], out: Path, bases: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
    """Write results.csv, curves.csv, summary.md and curves.png below `out`; returns the summary's rows by experiment.

    Args:
        bases: a row for each, losses on held-out text before and after its pre-training and on the study's texts.

    `steps_to_target` is the first step at which a run's dev score reaches the best of scratch's with the same seed.
    """
    rows = results(records)
    pd.DataFrame(rows).to_csv(out / "results.csv", index=False)
    curves = [{**_facts(record), **row} for record in records for row in record["run"]["history"]]
    pd.DataFrame(curves).to_csv(out / "curves.csv", index=False)
    reported = [row for row in rows if row["reported"]]
    by_experiment = {
        name: [row for row in reported if row["experiment"] == name] for name in _unique(reported, "experiment")
    }
    tables = {name: summary(of) for name, of in by_experiment.items()}
    gains = {name: {rival: paired_gains(of, rival) for rival in RIVALS} for name, of in by_experiment.items()}
    chosen = [_chosen(row) for row in reported if row["method"] not in ("tune", "apply")]
    text = ["# Results", ""]
    if bases:
        columns = list(dict.fromkeys(name for row in bases for name in row))
        text += ["## Bases", "", "Losses on held-out text before and after, and on the study's texts.", ""]
        text += [table(list(bases), columns), ""]
    for name, lines in tables.items():
        text += [f"## {name}", "", table(lines), ""]
        for rival, lines in gains[name].items():
            if lines:
                text += [f"Test score against {rival}, paired by seed and edge (95% t interval), in points:", ""]
                text += [table(lines), ""]
    if chosen:
        unique = [dict(items) for items in dict.fromkeys(tuple(row.items()) for row in chosen)]
        text += ["## Settings of each method", "", table(unique), ""]
    (out / "summary.md").write_text("\n".join(text), encoding="utf-8")
    if panels := _panels(records):
        plot(panels, out / "curves.png")
    return {"summary": tables, "gains": gains}


def results(records: list[Record]) -> list[dict[str, Any]]:
    """One tidy row per run."""
    scratch = {
        _key(record): record["run"] for record in records if record["method"] == "scratch" and record["reported"]
    }
    rows = []
    for record in records:
        run, metrics = record["run"], record["run"]["metrics"]
        rival = scratch.get(_key(record)) if record["reported"] else None
        target = dev_best(rival) if rival else None
        rows.append(
            {
                **_facts(record),
                "metric": metrics["metric"],
                "dev_best": dev_best(run),
                "test": metrics["test"].get(metrics["metric"]),
                **_other_tests(metrics),
                **record.get("texts", {}),
                "best_step": int(metrics["best_step"]),
                "target": target,
                "steps_to_target": None if target is None else steps_to_target(run, target),
                "examples": int(metrics["examples"]),
                "seconds": metrics["seconds"],
                "settings": json.dumps(record["settings"]),
            }
        )
    return rows


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and standard deviation over seeds for each edge, tuning kind and method."""
    lines = []
    for key in _unique(rows, *_GROUP, "method"):
        of = [row for row in rows if tuple(row[k] for k in (*_GROUP, "method")) == key]
        reached = [row["steps_to_target"] for row in of if row["steps_to_target"] is not None]
        known = any(row["target"] is not None for row in of)
        lines.append(
            {
                **dict(zip((*_GROUP[1:], "method"), key[1:], strict=True)),
                "runs": len(of),
                "dev": _mean_std([row["dev_best"] for row in of]),
                "test": _mean_std([row["test"] for row in of if row["test"] is not None]),
                **{name: _mean_std([row[name] for row in of if name in row]) for name in _scores_of(of)},
                "steps_to_target": f"{median(reached):g}" if reached else None,
                "never": len(of) - len(reached) if known else None,
                "seconds": round(float(np.mean([row["seconds"] for row in of])), 1),
            }
        )
    return lines


def paired_gains(rows: list[dict[str, Any]], rival: str) -> list[dict[str, Any]]:
    """Each method's test score minus the rival's of the same seed, edge and tuning: mean, 95% t interval, in points.

    Where tasks are scored by several metrics, each has lines of its own.
    """
    tests = {(tuple(row[k] for k in (*_GROUP, "seed")), row["method"]): row for row in rows}
    gains, metrics = [], _unique(rows, "metric")
    for metric, method in _unique([row for row in rows if row["method"] != rival], "metric", "method"):
        pairs = [
            100 * (row["test"] - tests[key, rival]["test"])
            for (key, of), row in tests.items()
            if (row["metric"], of) == (metric, method) and (key, rival) in tests
        ]
        if pairs:
            low, high = interval(pairs)
            of_metric = {"metric": metric} if len(metrics) > 1 else {}
            mean = float(np.mean(pairs))
            gains.append({**of_metric, "method": method, "pairs": len(pairs), "gain": mean, "low": low, "high": high})
    return gains


def interval(values: list[float], confidence: float = 0.95) -> tuple[float, float] | tuple[None, None]:
    """Student's t interval of the mean; fewer than two values have none."""
    if len(values) < 2:
        return None, None
    half = stats.t.ppf(0.5 + confidence / 2, len(values) - 1) * stats.sem(values)
    return float(np.mean(values) - half), float(np.mean(values) + half)


def _other_tests(metrics: dict[str, Any]) -> dict[str, float]:
    """`test_<score>` -> the scores on test beside the main one."""
    return {f"test_{name}": value for name, value in metrics["test"].items() if name != metrics["metric"]}


def _scores_of(rows: list[dict[str, Any]]) -> list[str]:
    """The columns that the kinds of tasks, and the study's texts, bring."""
    return list(dict.fromkeys(name for row in rows for name in row if name.startswith(("test_", "loss_"))))


def _facts(record: Record) -> dict[str, Any]:
    return {k: v for k, v in record.items() if k not in ("run", "settings", "texts")}


def _key(record: Record) -> tuple[Any, ...]:
    return tuple(record[k] for k in (*_GROUP, "seed"))


def _unique(rows: list[dict[str, Any]], *keys: str) -> list[Any]:
    found = dict.fromkeys(tuple(row[k] for k in keys) for row in rows)
    return [key[0] for key in found] if len(keys) == 1 else list(found)


def _mean_std(values: list[float]) -> str | None:
    if not values:
        return None
    return f"{np.mean(values):.3f}" + (f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else "")


def _chosen(row: dict[str, Any]) -> dict[str, Any]:
    return {k: row[k] for k in ("experiment", "tuning", "method", "settings")}


def _panels(records: list[Record]) -> dict[str, dict[str, list[Run]]]:
    """Title -> method -> its runs over the reported seeds."""
    panels: dict[str, dict[str, list[Run]]] = {}
    for record in records:
        if record["reported"] and record["method"] != "tune":
            title = "{experiment}: {task}, {old} to {new}, {tuning}".format(**record)
            panels.setdefault(title, {}).setdefault(record["method"], []).append(record["run"])
    return panels
