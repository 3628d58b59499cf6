"""What `recyclable doctor` found, for people: a line per host, then a line per finding."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

_GB = 1e9


def lines(found: dict[str, Any]) -> Iterator[str]:
    """All of it, in order of the hosts."""
    for host, report in found["hosts"].items():
        yield f"{host}: {_host(report, found['trial'].get(host))}"
    if tried := list(found["trial"].values()):
        if len(tried) > 1:
            slowest = min(tried, key=lambda one: one["mb_per_s"])
            latency = max(one["latency_ms"] for one in tried)
            speed = f"{slowest['mb_per_s']:,.0f} MB/s, {latency:.2g} ms for one number"
            sums = "right" if all(one["right"] for one in tried) else "wrong"
            yield f"all-reduce over {len(tried)} hosts ({slowest['backend']}): sums are {sums}, {speed}"
        if tried[0]["run"] == "":
            yield "run: all hosts have the same bases, weights, tasks and corpora, and share `out`"
    for finding in found["findings"]:
        yield f"{'wrong' if finding['grave'] else 'notice'}: {finding['host']}: {finding['text']}"
    if found["right"]:
        yield "doctor: nothing is wrong"


def _host(report: dict[str, Any], tried: dict[str, Any] | None) -> str:
    versions = report["versions"]
    named = ", ".join(f"{name} {versions[name] or '-'}" for name in ("python", "torch", "deepspeed", "transformers"))
    devices = report["devices"] or []
    gpus = f"{len(devices)} x {devices[0]}" if devices else "no GPU"
    seen = f", torch sees {tried['devices']} with CUDA {tried['cuda']}" if tried and devices else ""
    memory = report["memory"]["available"] / _GB
    rooms = ", ".join(
        f"{told['free'] / _GB:,.0f} GB in {folder}" for folder, told in report["folders"].items() if told["free"]
    )
    skew = report["clock_ahead_s"]
    clock = f"; clock {skew:+.1f} s" if skew is not None and abs(skew) >= 1 else ""
    network = ", ".join(f"{name} {own[0]}" for name, own in report["interfaces"].items() if name != "lo")
    return (
        f"{named}; {gpus}{seen}; {report['cpus']} cores, {memory:,.0f} GB of memory free; room: {rooms}; "
        f"network: {network or 'none'}{clock}"
    )
