"""Plots of what five_domains.py found: compatibility along the chain, paths, barriers beside distances of texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

NAME = "five_domains"


def draw(figures: dict[str, Any], folder: Path) -> None:
    """Write the PNGs."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, plot in (("compatibility", _compatibility), ("paths", _paths), ("steps", _steps)):
        figure = plot(figures)
        figure.savefig(folder / f"{NAME}-{name}.png", dpi=110)
        plt.close(figure)


def _panels(columns: int, rows: int = 1, **options: Any) -> tuple[plt.Figure, Any]:
    return plt.subplots(
        rows, columns, figsize=(4.4 * columns, 3.4 * rows), squeeze=False, layout="constrained", **options
    )


def _compatibility(figures: dict[str, Any]) -> plt.Figure:
    """The share of their worth that outdated weights keep, base by base; the control stands apart, at -0.5 at least."""
    rows = figures["compatibility"]
    tunings = list(dict.fromkeys(row["tuning"] for row in rows))
    figure, axes = _panels(len(tunings), sharey=True)
    for axis, tuning in zip(axes[0], tunings, strict=True):
        for row in (row for row in rows if row["tuning"] == tuning):
            left = {name.removeprefix("left "): value for name, value in row.items() if name.startswith("left ")}
            chain = {name: value for name, value in left.items() if name.startswith("M")}
            (line,) = axis.plot(["M0", *chain], [1.0, *chain.values()], marker="o", label=row["task"])
            apart = {name: value for name, value in left.items() if name not in chain}
            axis.plot(
                list(apart),
                [max(-0.5, value) for value in apart.values()],
                marker="x",
                linestyle="",
                color=line.get_color(),
            )
        axis.axhline(0, linestyle=":", color="gray")
        axis.set(title=tuning, xlabel="base (C: unrelated)", ylabel="share of worth left" if axis is axes[0, 0] else "")
        axis.grid(alpha=0.3)
    axes[0, 0].legend()
    return figure


def _paths(figures: dict[str, Any]) -> plt.Figure:
    """Dev score and loss from weights tuned on the old base to weights tuned on the new one."""
    by_panel: dict[str, dict[str, dict[str, Any]]] = {}
    for (task, tuning, _), path in figures["paths_by_point"].items():
        by_panel.setdefault("full" if tuning == "full" else f"{tuning} and backbone", {})[task] = path
        if "adapter_alone" in path:
            by_panel.setdefault(f"{tuning} alone, on the new base", {})[task] = path["adapter_alone"]
    figure, axes = _panels(max(1, len(by_panel)), 2, sharex=True, sharey="row")
    for (title, paths), column in zip(by_panel.items(), axes.T, strict=False):
        for task, path in paths.items():
            column[0].plot(path["mu"], path["metric"], label=task)
            column[1].plot(path["mu"], path["loss"], label=task)
        column[0].set(title=title)
        column[1].set(xlabel="mu: 0 old model, 1 new model")
        for axis in column:
            axis.grid(alpha=0.3)
    axes[0, 0].set(ylabel="dev score")
    axes[1, 0].set(ylabel="dev loss")
    axes[0, 0].legend()
    return figure


def _steps(figures: dict[str, Any]) -> plt.Figure:
    """The barrier over one upgrade beside how far its text is from the task's, and from the text before."""
    figure, axes = _panels(2, sharey=True)
    titles = {"task_to_text": "task to the upgrade's text", "text_to_text": "text before to the upgrade's text"}
    looks = {"full": {"s": 90, "facecolors": "none", "edgecolors": "C0"}, "bottleneck": {"c": "C1"}}
    for axis, (name, title) in zip(axes[0], titles.items(), strict=True):
        for tuning, look in looks.items():
            of = [row for row in figures["steps"] if row["tuning"] == tuning and row["of_known"] is not None]
            axis.scatter([row[name] for row in of], [row["of_known"] for row in of], label=tuning, **look)
        axis.set(title=title, xlabel="Jensen-Shannon divergence, bits")
        axis.grid(alpha=0.3)
    axes[0, 0].set(ylabel="barrier, share of what the old model knows")
    axes[0, 0].legend()
    return figure
