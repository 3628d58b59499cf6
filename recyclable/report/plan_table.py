"""What `recyclable plan` found, for people: a line per regime, what was assumed, which to use."""

from __future__ import annotations

from typing import Any

_PARTS = ("weights", "gradients", "optimizer", "activations", "teacher", "logits", "buckets", "checkpoint", "process")


def table(plan: dict[str, Any]) -> str:
    """All of it in lines; memory is in GB of each device, at the moment when it holds most."""
    model, devices, run = plan["model"], plan["devices"], plan["run"]
    lines = [
        f"{model['name']}: {_millions(model['parameters'])} parameters, {_millions(model['trained'])} trained",
        f"{devices['count']} x {devices['name']} with {gb(devices['memory'])} GB each on {devices['hosts']} host"
        f"{'s' * (devices['hosts'] > 1)}; steps of {run['train_batch_size']} x {run['max_length']} tokens",
        *(f"assumed: {line}" for line in plan["assumed"]),
        "",
    ]
    head = ["regime", "device", "host", "nvme", "micro", "s/step", "tokens/s", ""]
    rows = [
        [
            row["name"],
            *(gb(row[f"{place}_bytes"]) for place in ("device", "host", "nvme")),
            str(row["micro_batch"]),
            f"{row['seconds_per_step']:.3g}",
            f"{row['tokens_per_s']:,.0f}",
            "fits" if row["fits"] else "-",
        ]
        for row in plan["regimes"]
    ]
    parts = [[row["name"], *(gb(row["memory"][part]) for part in _PARTS)] for row in plan["regimes"]]
    lines += [
        "GB of a device at its peak, of a host and its NVMe:",
        *aligned([head, *rows], "  "),
        "",
        "GB of a device, and of its part of the host, at the device's peak:",
        *aligned([["regime", *_PARTS], *parts], " "),
        "",
    ]
    if plan["chosen"] is None:
        return "\n".join([*lines, "nothing fits: more or larger devices, shorter texts, or an adapter (tuning: lora)"])
    return "\n".join([*lines, f"use {plan['chosen']}: the fastest that leaves {plan['margin']:.0%} of the memory free"])


def aligned(rows: list[list[str]], between: str) -> list[str]:
    """Columns, all but the first to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    cells = ([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows)
    return [between.join(one).rstrip() for one in cells]


def gb(size: float) -> str:
    """Bytes as GB."""
    return f"{size / 1e9:.1f}" if size < 99.95e9 else f"{size / 1e9:,.0f}"


def _millions(count: int) -> str:
    return f"{count / 1e9:.1f}B" if count >= 1e9 else f"{count / 1e6:.1f}M"
