"""What recycling gains over starting from scratch: convergence with all labels, scores with few, from a study's runs.

    python benchmarks/recycling.py studies/chemprot.yaml --out runs/chemprot      after `recyclable study` has run it
    python benchmarks/recycling.py --quick                                        runs the quickstart's study first

The peer is `scratch`: the new base tuned anew, which is what one does without recycling.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from statistics import median
from typing import Any

import yaml

from recyclable.config.run_file import load_config
from recyclable.recipes.study import collect
from recyclable.recipes.study_settings import StudySettings
from recyclable.report.compare import table
from recyclable.report.study_report import RIVALS, paired_gains, results


def main() -> None:
    """Print the figures as tables, or as one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", nargs="?", help="a study file whose runs are finished, or in part")
    parser.add_argument("--out", help="where its runs are, over the file's `out`")
    parser.add_argument("--quick", action="store_true", help="run the quickstart and take its study")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if arguments.quick:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "recyclable.cli", "quickstart", "--out", f"{folder}/quickstart"]
            subprocess.run(command, check=True, stdout=sys.stderr)
            figures = measure(load_config(StudySettings, f"{folder}/quickstart/study.yaml"))
    else:
        if not arguments.study:
            parser.error("name a study, or --quick")
        out = [f"out={json.dumps(arguments.out)}"] if arguments.out else []
        figures = measure(load_config(StudySettings, arguments.study, out))
    if arguments.json:
        print(json.dumps(figures))
    else:
        for name, content in figures.items():
            print(f"\n{name}\n" + yaml.safe_dump(content["convergence"], sort_keys=False))
            for rival in RIVALS:
                gains = content[f"gain_over_{rival}"]
                print(f"\nagainst {rival}, points of the test score\n" + (table(gains) if gains else "no pairs yet"))


def measure(config: StudySettings) -> dict[str, Any]:
    """Figures by experiment, from the runs on reported seeds."""
    rows = [row for row in results(collect(config)) if row["reported"]]
    figures = {}
    for name in config.experiments:
        of = [row for row in rows if row["experiment"] == name]
        gains = {f"gain_over_{rival}": paired_gains(of, rival) for rival in RIVALS}
        figures[name] = {"convergence": convergence(of), **gains}
    return figures


def convergence(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """By method: median of steps to scratch's best dev score over the steps scratch took; how many never reach it."""
    key = ("task", "old", "new", "tuning", "seed")
    scratch = {tuple(row[k] for k in key): row["steps_to_target"] for row in rows if row["method"] == "scratch"}
    figures = {}
    for method in dict.fromkeys(row["method"] for row in rows if row["method"] not in ("scratch", "apply")):
        of = [row for row in rows if row["method"] == method and tuple(row[k] for k in key) in scratch]
        ratios = [
            float("inf")
            if row["steps_to_target"] is None
            else row["steps_to_target"] / max(1, scratch[tuple(row[k] for k in key)])
            for row in of
        ]
        never = ratios.count(float("inf"))
        middle = median(ratios) if ratios else None
        figures[method] = {
            "pairs": len(of),
            "never": never,
            "median_steps_ratio": None if middle == float("inf") else middle,
        }
    return figures


if __name__ == "__main__":
    main()
