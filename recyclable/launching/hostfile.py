"""Hostfiles: which hosts a run has, and how many ranks each of them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from recyclable.errors import InputError


def read_hostfile(hostfile: str | Path) -> dict[str, int]:
    """Name -> ranks of each host, in order; InputError where it is no hostfile."""
    try:
        lines = [line.strip() for line in Path(hostfile).read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(hostfile, f"cannot be read ({error}), expected lines such as `node-1 slots=8`") from error
    hosts: dict[str, int] = {}
    for line in [line for line in lines if line and not line.startswith("#")] or [""]:
        if (found := re.match(r"([^\s-]\S*)\s+slots=(\d+)(?=\s|$)", line)) is None or int(found[2]) < 1:
            raise InputError(hostfile, f"holds {line!r}, expected lines such as `node-1 slots=8`")
        if found[1] in hosts:
            raise InputError(hostfile, f"names {found[1]} twice, expected each host once")
        hosts[found[1]] = int(found[2])
    return hosts


def write_hostfile(path: Path, hosts: Mapping[str, int]) -> Path:
    """Write what `read_hostfile` reads; returns the path."""
    path.write_text("".join(f"{name} slots={slots}\n" for name, slots in hosts.items()), encoding="utf-8")
    return path
