"""Whether all hosts of a run have the same bases, weights, tasks and corpora, where they have disks of their own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from recyclable import distributed
from recyclable.disks import hosts
from recyclable.errors import InputError
from recyclable.launching.comparing import odd_ones
from recyclable.recipes.inputs import inputs
from recyclable.weights.digest import in_threads
from recyclable.weights.hashes import blake3_file

Place = tuple[str, str]
"""A setting, and the name of a file that it stands for."""


def require_same_inputs(settings: BaseModel | Mapping[str, Any]) -> None:
    """InputError on every rank, naming host and file, where hosts read different files under one name; a collective.

    A file of a file system that hosts share is known by its inode and its times, the same to the nanosecond on all of
    them, and not read; else its ranks hash a host's files together.
    """
    names, ranks = hosts(), distributed.Ranks()
    if len(set(names)) == 1:
        return
    host = names[ranks.rank]
    local = [rank for rank, name in enumerate(names) if name == host]
    files, problem = distributed.tried(lambda: _files(settings), "read")
    for name, found in zip(names, ranks.gather(problem), strict=True):
        if found is not None:
            raise InputError(found[0], f"on {name}: {found[1]}")
    assert files is not None
    stamps = dict(zip(names, ranks.gather({place: _stamp(path) for place, path in files.items()}), strict=True))
    _require_same({name: {place: str(place[1]) for place in found} for name, found in stamps.items()})
    unlike = sorted(place for place in files if len({found[place] for found in stamps.values()}) > 1)
    if not unlike:
        return
    distributed.say(f"{len(unlike)} files are not on a disk that all hosts share: they are compared by their content")
    own = unlike[local.index(ranks.rank) :: len(local)]
    hashed = in_threads(_digest, [files[place] for place in own])
    digests: dict[str, dict[Place, str | None]] = {name: {} for name in names}
    for name, of_rank in zip(names, ranks.gather(dict(zip(own, hashed, strict=True))), strict=True):
        digests[name] |= of_rank
    _require_same(digests)


def _files(settings: BaseModel | Mapping[str, Any]) -> dict[Place, Path]:
    """By names, since directories may be links that lead elsewhere on every host."""
    found: dict[Place, Path] = {}
    for field, paths in inputs(settings).items():
        seen: Counter[str] = Counter()
        for path in paths:
            seen[path.name] += 1
            number = seen[path.name]
            found[field, f"{path.name} #{number}" if number > 1 else path.name] = path
    return found


def _stamp(path: Path) -> tuple[int, ...] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_size, found.st_ino, found.st_mtime_ns, found.st_ctime_ns


def _digest(path: Path) -> str | None:
    """None where it cannot be read: whoever needs it says why."""
    try:
        return blake3_file(path)
    except OSError:
        return None


def _require_same(by_host: Mapping[str, Mapping[Place, str | None]]) -> None:
    """InputError for the first file that is not on every host, or not the same there."""
    for place in sorted({place for found in by_host.values() for place in found}):
        (field, file), values = place, {host: found.get(place) for host, found in by_host.items()}
        odd, right = odd_ones(values)
        if not odd:
            continue
        host = odd[0]
        if values[host] is None:
            raise InputError(field, f"{host} has no {file}, which {right} has: copy it there")
        if values[right or host] is None:
            raise InputError(field, f"{host} has {file}, which {right} lacks: expected the same on all hosts")
        raise InputError(field, f"{file} on {host} is not the same as on {right}: copy it there")
