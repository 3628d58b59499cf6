"""Distillation on the CPU: few-shot steps and the language-model loss beside what they replace, and memory over time.

    python benchmarks/distillation.py [--quick] [--json]

With --json the last line is one JSON object with a section for each of few_shot.py, lm_loss.py and sharded_teacher.py,
which say what their figures are and can also be run by themselves.
"""

from __future__ import annotations

import argparse
import json

import few_shot
import sharded_teacher


def main() -> None:
    """Measure one after the other, so that none disturbs another."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smaller and fewer steps")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    import lm_loss

    figures = {
        "few_shot": few_shot.measure(arguments.quick),
        "lm_loss": lm_loss.measure(arguments.quick),
        "sharded_teacher": sharded_teacher.measure(arguments.quick),
    }
    for name, values in figures.items():
        print(name, "  ".join(f"{key} {value:.3g}" for key, value in values.items()))
    if arguments.json:
        print(json.dumps(figures))


if __name__ == "__main__":
    main()
