"""Which host is wrong: the reports of all hosts beside each other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")
_SKEW_S = 5
_ROOM = 1 << 30
_SHARED_MEMORY = 1 << 30  # NCCL wants some tens of MiB for each pair of GPUs; containers have 64 MiB of it by default
_OPEN_FILES = 1024


@dataclass(frozen=True)
class Finding:
    """Something about one host."""

    host: str
    text: str
    grave: bool = True
    """Whether a run would fail, hang or be wrong; else it is worth a look."""

    def __str__(self) -> str:
        return f"{self.host}: {self.text}"


def compare(
    reports: Mapping[str, Mapping[str, Any]], skews: Mapping[str, float], slots: Mapping[str, int]
) -> list[Finding]:
    """What is wrong, by host; one host alone is looked at as well.

    Args:
        reports: host -> `host_report.report`.
        skews: host -> seconds that its clock is ahead of the command's.
        slots: host -> ranks it is to have.
    """
    found = [*_unlike(reports), *_clocks(skews)]
    for host, report in reports.items():
        found += _alone(host, report, slots.get(host, 1))
    return found


def odd_ones(values: Mapping[str, T]) -> tuple[list[str], str | None]:
    """Hosts whose value is not what most have, and one that has that; of values as frequent the first host's holds."""
    counts = Counter(map(repr, values.values()))
    most = max(counts.values(), default=0)
    right = next((host for host, value in values.items() if counts[repr(value)] == most), None)
    return [host for host, value in values.items() if right is not None and value != values[right]], right


def _unlike(reports: Mapping[str, Mapping[str, Any]]) -> Iterator[Finding]:
    """What must be the same everywhere and is not."""
    names = dict.fromkeys(name for report in reports.values() for name in report["versions"])
    for name in names:
        versions = {host: report["versions"].get(name) for host, report in reports.items()}
        odd, right = odd_ones(versions)
        for host in odd:
            has = f"has {name} {versions[host]}" if versions[host] else f"has no {name}"
            yield Finding(host, f"{has}, {right} has {versions[right or host] or 'none'}: expected the same")
    odd, right = odd_ones({host: report["code"] for host, report in reports.items()})
    for host in odd:
        yield Finding(host, f"has another state of recyclable's code than {right}: install the same on both")
    for file in dict.fromkeys(file for report in reports.values() for file in report["files"]):
        digests = {host: report["files"].get(file) for host, report in reports.items()}
        odd, right = odd_ones(digests)
        lacking = [host for host, digest in digests.items() if digest is None]
        for host in lacking:
            yield Finding(host, f"has no {file}, or may not read it")
        for host in odd:
            if host not in lacking and right not in lacking:
                yield Finding(host, f"has another {file} than {right}: copy it there")
    odd, right = odd_ones({host: sorted(report["devices"] or []) for host, report in reports.items()})
    for host in odd:
        others = reports[right or host]["devices"]
        yield Finding(host, f"has {_devices(reports[host]['devices'])}, {right} has {_devices(others)}", grave=False)


def _clocks(skews: Mapping[str, float]) -> Iterator[Finding]:
    """Clocks that differ: the middle one is taken for right."""
    if not skews:
        return
    middle = sorted(skews.values())[(len(skews) - 1) // 2]
    for host, skew in skews.items():
        if abs(skew - middle) > _SKEW_S:
            way = "ahead of" if skew > middle else "behind"
            text = f"its clock is {abs(skew - middle):.0f} s {way} the others': set it, by NTP for example"
            yield Finding(host, text)


def _alone(host: str, report: Mapping[str, Any], slots: int) -> Iterator[Finding]:
    """What one host lacks by itself."""
    devices, threads = report["devices"], report["threads"]
    if devices and slots > len(devices):
        yield Finding(host, f"has {len(devices)} GPUs for {slots} ranks")
    if not devices and (threads or 1) * slots > report["cpus"]:
        text = f"has {report['cpus']} cores for {slots} ranks of {threads or 1} threads: they will slow each other"
        yield Finding(host, text, grave=False)
    for variable, name in report["chosen_interfaces"].items():
        wanted = [each for each in name.removeprefix("=").split(",") if each and not name.startswith("^")]
        prefix_only = variable.startswith("NCCL") and not name.startswith("=")
        there = report["interfaces"]
        if wanted and not any(
            have.startswith(each) if prefix_only else have == each for have in there for each in wanted
        ):
            yield Finding(host, f"has no interface {name} ({variable}), found {', '.join(there)}")
    for folder, told in report["folders"].items():
        if not told["writable"]:
            yield Finding(host, f"{folder} cannot be written to")
        elif told["free"] is not None and told["free"] < _ROOM:
            yield Finding(
                host, f"{folder} has {told['free'] / _ROOM:.2f} GiB of room left", grave=told["free"] < 1 << 20
            )
    shared = report["shared_memory"]
    if devices and slots > 1 and shared is not None and shared < _SHARED_MEMORY:
        text = f"/dev/shm has {shared >> 20} MiB, in which ranks on GPUs meet: give the container more (--shm-size)"
        yield Finding(host, text, grave=False)
    if report["open_files"] < _OPEN_FILES:
        yield Finding(host, f"a process may open {report['open_files']} files, expected {_OPEN_FILES}", grave=False)


def _devices(devices: list[str] | None) -> str:
    counts = Counter(devices or [])
    return ", ".join(f"{count} x {name}" for name, count in counts.items()) or "no GPU"
