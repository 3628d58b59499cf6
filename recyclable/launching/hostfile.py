"""Hostfiles: which hosts a run has, and how many ranks each of them."""

from __future__ import annotations

import re
from pathlib import Path

from recyclable.errors import InputError


def hosts_of(hostfile: Path) -> list[str]:
    """Names of the hosts, in order; InputError where it is no hostfile."""
    try:
        lines = [line.strip() for line in hostfile.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(hostfile, f"cannot be read ({error}), expected lines such as `node-1 slots=8`") from error
    lines = [line for line in lines if line and not line.startswith("#")]
    for line in lines or [""]:
        if not re.match(r"\S+\s+slots=\d+", line):
            raise InputError(hostfile, f"holds {line!r}, expected lines such as `node-1 slots=8`")
    return [line.split()[0] for line in lines]
