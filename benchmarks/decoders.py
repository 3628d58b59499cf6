"""What the study of a real decoder says: tables of scores beside what was forgotten, and a plot; from finished runs.

    python benchmarks/decoders.py studies/decoders.yaml [--out DIR] [--plot docs/decoders.png] [--json]

Any number of the study's runs may still be missing. `score` is the test score: accuracy, or exact match of generated
answers; `sd` its standard deviation over the seeds. `forgot` is the loss on old text less that of the base the weights
are on, in nats per token: what tuning or recycling cost of it; a classifier has no language-model head to tell it by.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from recyclable.config.run_file import load_config
from recyclable.recipes.study import bases, collect
from recyclable.recipes.study_settings import StudySettings
from recyclable.report.compare import table
from recyclable.report.study_report import results

SHOWN = ("test_exact_match", "test")
"""The first of these that a run has is its score."""
ORDER = ("tune", "apply", "shuffled", "scratch", "init", "shuffled_init", "distill", "both")
Row = dict[str, Any]


def main() -> None:
    """Print the tables, or one JSON object; draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", help="the study's file")
    parser.add_argument("--out", help="where its runs are, over the file's `out`")
    parser.add_argument("--old", default="general", help="which of its texts is the old one (default general)")
    parser.add_argument("--plot", type=Path, metavar="PNG")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    out = [f"out={json.dumps(arguments.out)}"] if arguments.out else []
    config = load_config(StudySettings, arguments.study, out)
    chain = bases(config)
    runs = scored(results(collect(config)), chain, f"loss_{arguments.old}")
    if arguments.plot:
        draw(runs, arguments.plot)
    if arguments.json:
        print(json.dumps({"bases": chain, "runs": runs}))
        return
    print(table(chain, list(dict.fromkeys(name for row in chain for name in row))))
    for task in dict.fromkeys(row["task"] for row in runs):
        of = [{name: value for name, value in row.items() if name != "task"} for row in runs if row["task"] == task]
        print(f"\n## {task}\n\n{table(of, list(dict.fromkeys(name for row in of for name in row)))}")


def scored(rows: list[Row], chain: list[Row], old: str) -> list[Row]:
    """A row for each task, base, tuning and method: means over the reported seeds."""
    of_base = {row["base"]: row.get(old) for row in chain}
    key = ("task", "new", "tuning", "method")
    reported = [row for row in rows if row["reported"]]
    found = []
    for group in dict.fromkeys(tuple(row[k] for k in key) for row in reported):
        of = [row for row in reported if tuple(row[k] for k in key) == group]
        line: Row = {**dict(zip(("task", "base", "tuning", "method"), group, strict=True)), "seeds": len(of)}
        scores = [next(row[name] for name in SHOWN if name in row) for row in of]
        line["score"], line["sd"] = mean(scores), stdev(scores) if len(scores) > 1 else None
        if of[0]["metric"] == "log_likelihood":
            line["log-likelihood"] = mean(row["test"] for row in of)
        told, before = [row[old] for row in of if old in row], of_base[group[1]]
        line["forgot"] = mean(told) - before if told and before is not None else None
        line["examples"] = of[0]["examples"]
        found.append(line)
    places = {name: place for place, name in enumerate(ORDER)}
    edges = list(dict.fromkeys((row["base"], row["tuning"]) for row in found))
    tasks = list(dict.fromkeys(row["task"] for row in found))
    return sorted(
        found,
        key=lambda row: (
            tasks.index(row["task"]),
            edges.index((row["base"], row["tuning"])),
            places.get(row["method"], len(places)),
        ),
    )


def draw(runs: list[Row], file: Path) -> None:
    """By task: scores of the methods above, what each forgot below; a color for each base and kind of tuning."""
    tasks = list(dict.fromkeys(row["task"] for row in runs))
    methods = [name for name in ORDER if any(row["method"] == name for row in runs)]
    figure, axes = plt.subplots(
        2, len(tasks), figsize=(4.2 * len(tasks), 6), squeeze=False, sharex=True, layout="constrained"
    )
    lines = list(dict.fromkeys((row["base"], row["tuning"]) for row in runs))
    for column, task in enumerate(tasks):
        of_task = [row for row in runs if row["task"] == task]
        for axis, name in zip(axes[:, column], ("score", "forgot"), strict=True):
            for number, (base, tuning) in enumerate(lines):
                of = [r for r in of_task if (r["base"], r["tuning"]) == (base, tuning) and r[name] is not None]
                aside = 0.14 * (number - (len(lines) - 1) / 2)  # so that none hides another
                places = [methods.index(row["method"]) + aside for row in of]
                spread = [row["sd"] or 0 if name == "score" else 0 for row in of]
                look = {"fmt": "o", "capsize": 2, "label": f"{base}, {tuning}", "color": f"C{number}"}
                axis.errorbar(places, [row[name] for row in of], yerr=spread, **look)
            axis.set_xticks(range(len(methods)), methods, rotation=45, ha="right")
            axis.grid(alpha=0.3)
            if all(row[name] is None for row in of_task):
                axis.text(0.5, 0.5, "no language-model head", ha="center", transform=axis.transAxes)
                axis.set_yticks([])
        axes[0, column].set(title=task)
    axes[0, 0].set_ylabel("test score")
    axes[1, 0].set_ylabel("loss on old text, against the base")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=len(lines))
    figure.savefig(file, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
