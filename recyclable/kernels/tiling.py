"""Large dimensions in pieces: one place that says which, so that whoever only looks need not go through them all."""

from __future__ import annotations

from collections.abc import Iterator


def tiles(length: int, size: int) -> Iterator[slice]:
    """Pieces of `size`, the last of what is left."""
    return (slice(start, min(start + size, length)) for start in range(0, length, size))
