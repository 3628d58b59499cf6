"""The tables of docs/performance.md: each part between marks of its own, so that a part can be measured again alone."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

DOCUMENT = Path(__file__).parents[1] / "docs" / "performance.md"
_PACKAGES = ("torch", "deepspeed", "transformers", "accelerate", "peft")
Row = dict[str, Any]


def cpu_table(rows: list[Row]) -> str:
    """Ours and the peer, side by side."""
    heads = ["model", "ZeRO", "ranks", "precision", "ours, tokens/s", "HF Trainer + DeepSpeed, tokens/s", "speed-up"]
    heads += ["mean loss difference", "ours, peak MB", "peer, peak MB", "share of the products' rate"]
    return table(
        heads,
        [
            [
                *(str(row[key]) for key in ("model", "stage", "ranks", "precision")),
                *(f"{row[key]:,.0f}" for key in ("ours_tokens_per_s", "peer_tokens_per_s")),
                *(f"{row['speedup']:.2f}", f"{row['loss_diff']:.0e}"),
                *(f"{row[key]:,.0f}" for key in ("ours_peak_mb", "peer_peak_mb")),
                f"{row['gemm_share']:.0%}",
            ]
            for row in rows
        ],
    )


def stack_table(found: Row) -> str:
    """A stack against its runs one by one, and the curve of steps alone."""
    whole = f"{found['adapters']} adapters, whole runs: {found['alone_s']:.0f} s one by one, "
    whole += f"{found['together_s']:.0f} s together, speed-up {found['speedup']:.2f}; "
    whole += f"largest relative difference of a tensor {found['max_rel_diff']:.0e}, of a score "
    whole += f"{found['max_score_diff']:.0e}; between runs alone with other numbers of threads "
    whole += f"{found['rounding_rel_diff']:.0e} and {found['rounding_score_diff']:.0e}."
    texts = sorted({row["texts"] for row in found["curve"]})
    speedups = {(row["adapters"], row["texts"]): f"{row['speedup']:.2f}" for row in found["curve"]}
    adapters = sorted({row["adapters"] for row in found["curve"]})
    lines = [[str(count), *(speedups.get((count, each), "") for each in texts)] for count in adapters]
    return f"{whole}\n\n{table(['adapters', *(f'{each} texts each' for each in texts)], lines)}"


def startup_table(found: dict[str, float]) -> str:
    """Seconds by ranks."""
    return table(["", "seconds to the first step"], [[name, f"{took:.1f}"] for name, took in found.items()])


def gpu_table(rows: list[Row]) -> str:
    """Whatever the GPU's rows have, part by part, as each has columns of its own."""
    parts: dict[str, list[Row]] = {}
    for row in rows:
        parts.setdefault(row["part"], []).append(row)
    tables = []
    for part, those in parts.items():
        heads = [key for key in those[0] if key != "part"]
        tables.append(f"{part}:\n\n{table(heads, [[_shown(row[key]) for key in heads] for row in those])}")
    return "\n\n".join(tables)


TABLES: dict[str, Callable[[Any], str]] = {
    **{"cpu": cpu_table, "stack": stack_table, "startup": startup_table, "gpu": gpu_table},
}
"""Part -> its results as Markdown."""


def told_of(what: str) -> str:
    """What the figures are, machine, versions, date."""
    processor = _processor()
    if torch.cuda.is_available():
        processor = f"{torch.cuda.get_device_name()}; {processor}"
    packages = ", ".join(f"{name} {version(name)}" for name in _PACKAGES)
    cores = len(os.sched_getaffinity(0))
    today = datetime.now(UTC).date().isoformat()
    python = platform.python_version()
    return f"{what}, {today}, {processor}, {cores} cores, Python {python}, {packages}."


def _processor() -> str:
    try:
        return re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[1].strip()
    except (OSError, TypeError):
        return platform.machine()


def write_tables(found: dict[str, Any], told: str, document: Path = DOCUMENT) -> None:
    """Put what was measured between its part's marks; parts that were not keep what they have."""
    text = document.read_text(encoding="utf-8")
    for part, what in found.items():
        if what is not None:
            text = between_marks(text, part, f"{told}\n\n{TABLES[part](what)}")
    document.write_text(text, encoding="utf-8")


def between_marks(text: str, part: str, content: str) -> str:
    """The text with other content between `<!-- part -->` and `<!-- /part -->`; ValueError where they are missing."""
    pattern = re.compile(rf"(<!-- {part} -->\n).*?(<!-- /{part} -->)", re.DOTALL)
    if len(pattern.findall(text)) != 1:
        raise ValueError(f"expected one pair of marks <!-- {part} -->, <!-- /{part} -->")
    return pattern.sub(lambda found: f"{found[1]}{content}\n{found[2]}", text)


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    return (
        f"{value:,.3g}"
        if isinstance(value, float) and abs(value) < 100
        else f"{value:,.0f}"
        if isinstance(value, float)
        else str(value)
    )


def table(heads: list[str], lines: list[list[str]]) -> str:
    """Markdown."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [heads, ["---"] * len(heads), *lines])
