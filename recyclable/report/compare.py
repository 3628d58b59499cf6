"""Methods beside each other: scores, the step at which scratch's best is reached, cost; as rows, table and plot."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from recyclable.errors import InputError

Run = dict[str, Any]
"""What a manifest says of a run: `method`, `metrics` and `history`."""

COLUMNS = ("method", "dev_best", "test", "best_step", "steps_to_target", "examples", "seconds")


def steps_to_target(run: Run, target: float) -> int | None:
    """The first evaluated step whose dev score is at least `target`, None if no step's is."""
    metric = run["metrics"].get("metric")
    return next((int(row["step"]) for row in _curve(run) if row[metric] >= target), None)


def _curve(run: Run) -> list[dict[str, Any]]:
    """The history of a run; nothing where it is not of the run's metric, as of weights that came from elsewhere."""
    history, wanted = run["history"], {"step", run["metrics"].get("metric")}
    return history if all(wanted <= row.keys() for row in history) else []


def dev_best(run: Run) -> float | None:
    """The best dev score of a run; None for weights that came without one."""
    return run["metrics"].get("dev", {}).get(run["metrics"].get("metric"))


def compare(runs: dict[str, Run]) -> list[dict[str, Any]]:
    """A row per run. The target is the best dev score of the run whose method is scratch; without one there is none."""
    target = next((dev_best(run) for run in runs.values() if run["method"] == "scratch"), None)
    rows = []
    for label, run in runs.items():
        metrics = run["metrics"]
        rows.append(
            {
                "method": label,
                "dev_best": dev_best(run),
                "test": metrics.get("test", {}).get(metrics.get("metric")),
                "best_step": int(metrics.get("best_step", 0)),
                "steps_to_target": None if target is None else steps_to_target(run, target),
                "examples": int(metrics.get("examples", 0)),
                "seconds": round(metrics.get("seconds", 0.0), 1),
            }
        )
    return rows


def table(rows: list[dict[str, Any]], columns: tuple[str, ...] | list[str] | None = None) -> str:
    """Rows as a Markdown table that also reads well in a terminal."""
    columns = list(columns or rows[0])
    cells = [[_show(row.get(column)) for column in columns] for row in rows]
    widths = [max(len(text) for text in (column, *(row[i] for row in cells))) for i, column in enumerate(columns)]
    rule = ["-" * width for width in widths]
    lines = ([text.ljust(width) for text, width in zip(row, widths, strict=True)] for row in [columns, rule, *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _show(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def require_plottable(path: Path, where: str) -> None:
    """InputError, which names `where`, for a path that `plot` cannot write to; nothing is written yet."""
    from matplotlib.backend_bases import FigureCanvasBase

    known = sorted(FigureCanvasBase.get_supported_filetypes())
    if path.suffix[1:].lower() not in known:
        raise InputError(where, f"found {str(path)!r}, expected a file that ends in one of .{', .'.join(known)}")
    if path.is_dir():
        raise InputError(where, f"{path} is a directory, expected a file")
    try:
        TemporaryFile(dir=path.parent).close()
    except (OSError, ValueError) as error:
        problem = f"{path.parent} cannot be used ({getattr(error, 'strerror', None) or error})"
        raise InputError(where, f"{problem}, expected a directory that can be written to") from error


def plot(panels: dict[str, dict[str, list[Run]]], path: Path) -> None:
    """Dev curves, one panel each; runs under one label are averaged, with their range shaded.

    Args:
        panels: panel title -> label -> runs (their seeds). Runs without a curve of their metric are left out.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    figure, axes = plt.subplots(1, len(panels), figsize=(5.2 * len(panels), 4), squeeze=False, layout="constrained")
    for axis, (title, curves) in zip(axes[0], panels.items(), strict=True):
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
        for label, runs in curves.items():
            drawn = [rows for run in runs if (rows := _curve(run))]
            if not drawn:
                continue
            metric = runs[0]["metrics"]["metric"]
            axis.set_ylabel(f"dev {metric}")
            if len(drawn[0]) == 1:  # nothing was trained: a level, not a curve
                level = np.mean([rows[0][metric] for rows in drawn])
                axis.axhline(level, linestyle=":", color="gray", label=label)
                continue
            steps = [row["step"] for row in drawn[0]]
            values = np.array([[row[metric] for row in rows] for rows in drawn])
            (line,) = axis.plot(steps, values.mean(0), label=label)
            axis.fill_between(steps, values.min(0), values.max(0), alpha=0.15, color=line.get_color())
        if axis.get_legend_handles_labels()[0]:
            axis.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
