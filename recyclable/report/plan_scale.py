"""What `recyclable plan --scale` found: a table with a line for a model on so many devices, and a plot."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import Any

from recyclable.report.plan_table import aligned, gb

_HEAD = ["model", "devices", "regime", "micro", "GB", "s/step", "tokens/s", "MFU", "kept", "days/1B"]


def table(plan: dict[str, Any]) -> str:
    """All of it in lines."""
    devices = plan["devices"]
    lines = [
        f"{devices['name']}, {devices['on_a_host']} on a host",
        *(f"assumed: {line}" for line in plan["assumed"]),
        "",
        "memory of each device at its peak; kept: of the tokens/s of each device on the fewest that fit;",
        "days/1B: days of one device for 1,000,000,000 tokens",
    ]
    return "\n".join([*lines, *aligned([_HEAD, *map(_line, plan["rows"])], "  ")])


def _line(row: dict[str, Any]) -> list[str]:
    start = [row["model"], f"{row['devices']:,}"]
    if not row["fits"]:
        return [*start, "does not fit", *[""] * (len(_HEAD) - 3)]
    return [
        *start,
        row["name"],
        str(row["micro_batch"]),
        gb(row["device_bytes"]),
        f"{row['seconds_per_step']:.3g}",
        f"{row['tokens_per_s']:,.0f}",
        f"{row['mfu']:.1%}",
        f"{row['efficiency']:.0%}",
        f"{row['device_days_per_billion_tokens']:.3g}",
    ]


def plot(plan: dict[str, Any], path: Path) -> None:
    """Tokens per second, and MFU, against devices; a line for a model."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10.4, 4.2), layout="constrained")
    for model, rows in groupby(plan["rows"], key=lambda row: row["model"]):
        fitting = [row for row in rows if row["fits"]]
        for axis, key in zip(axes, ("tokens_per_s", "mfu"), strict=True):
            axis.plot([row["devices"] for row in fitting], [row[key] for row in fitting], marker=".", label=model)
    counts = sorted({row["devices"] for row in plan["rows"]})
    for axis, title in zip(axes, ("tokens per second", "model FLOPs utilisation"), strict=True):
        axis.set(title=title, xlabel=plan["devices"]["name"])
        axis.set_xscale("log", base=2)
        axis.set_xticks(counts, [str(count) for count in counts])
        axis.grid(alpha=0.3)
    axes[0].set_yscale("log")
    axes[1].set_ylim(bottom=0)
    axes[1].legend(fontsize=8, loc="lower left")
    figure.savefig(path, dpi=120)
    plt.close(figure)
