"""Hosts and their disks: which ranks are on one host, and who writes for those that do not share a directory."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from socket import gethostname

from recyclable import distributed
from recyclable.errors import InputError


def hosts() -> list[str]:
    """The name of each rank's host, different ones for different hosts; a collective."""
    told = distributed.Ranks().gather((gethostname(), _identity()))
    seen: dict[tuple[str, str], str] = {}
    for name, identity in told:
        taken = set(seen.values())
        other = f"{name} ({len(taken) + 1})" if name in taken else name  # as containers of one image
        seen.setdefault((name, identity), other)
    return [seen[each] for each in told]


def keeper(folder: Path) -> int:
    """The rank that writes into a directory for this one; a collective.

    Rank 0 where all ranks share the directory, else the first rank of this host that has the same path, as each may
    have a cache of its own. In doubt that, which costs the same work twice and does no harm: what is kept in caches is
    whole or absent, whoever writes it.
    """
    places = list(zip(hosts(), distributed.Ranks().gather(os.path.realpath(folder)), strict=True))
    if len(set(places)) == 1:
        return 0
    token = distributed.broadcast_object(secrets.token_hex(8))
    mark = folder / f".shared-{token}"
    if distributed.is_main():
        with suppress(OSError):  # whoever writes there next says what is wrong
            folder.mkdir(parents=True, exist_ok=True)
            mark.touch()
    distributed.barrier()
    seen = distributed.Ranks().gather(mark.exists())
    if distributed.is_main():
        with suppress(OSError):
            mark.unlink(missing_ok=True)
    return 0 if all(seen) else places.index(places[distributed.rank()])


def require_alike(digests: Mapping[str, str]) -> None:
    """InputError on every rank, naming what and the host, where ranks have read different content; a collective.

    The last word on what no file on the hosts told of before, as data sets of the hub.
    """
    told = distributed.Ranks().gather(dict(digests))
    for what, digest in told[0].items():
        other = next((rank for rank, theirs in enumerate(told) if theirs.get(what) != digest), None)
        if other is not None:
            names = hosts()
            raise InputError(what, f"is not the same on {names[other]} as on {names[0]}: expected the same content")


def _identity() -> str:
    """What two processes that see the same disks have in common: host and mount space (containers have their own)."""
    found = []
    with suppress(OSError):
        found.append(Path("/proc/sys/kernel/random/boot_id").read_text())
    with suppress(OSError):
        found.append(os.readlink("/proc/self/ns/mnt"))
    return " ".join(found)
