"""Decides whether adapted weights may go onto a base: their own base, or a recorded descendant of it."""

from __future__ import annotations

from recyclable.errors import InputError
from recyclable.weights.adapted import AdaptedWeights
from recyclable.weights.base import Base
from recyclable.weights.fingerprint import Fingerprint, fingerprint
from recyclable.weights.lineage import FILE, read_lineage, relation


def require_own_base(weights: AdaptedWeights, base: Base, found: Fingerprint | None = None) -> Fingerprint:
    """The base's fingerprint if the weights were tuned on exactly this base, else InputError.

    Args:
        found: the base's fingerprint where it is known already.
    """
    found = found or fingerprint(base)
    recorded = weights.manifest.base
    wanted = recorded["fingerprint"]
    for part, got in found.as_dict().items():
        if wanted[part] != got:
            raise InputError(
                weights.folder,
                f"belongs to base {recorded.get('name')!r} ({part} {wanted[part][:12]}), "
                f"but {base.folder} has {part} {got[:12]}",
            )
    return found


def require_descendant(
    weights: AdaptedWeights, base: Base, allow_unrelated: bool = False, found: Fingerprint | None = None
) -> tuple[Fingerprint, str]:
    """The new base's fingerprint and its relation to the weights' base: `own`, `recorded`, `declared`.

    Without any it is an InputError, or `unrelated` if that is allowed.

    Args:
        found: the base's fingerprint where it is known already.
    """
    found = found or fingerprint(base)
    wanted = weights.manifest.base["fingerprint"]["weights"]
    related = relation(base.folder, found.weights, wanted)
    if related is None and not allow_unrelated:
        raise InputError(
            weights.folder,
            f"belongs to base {weights.manifest.base.get('name')!r} ({wanted[:12]}), and {base.folder} ({found}) "
            "does not descend from it by its lineage.json; `recyclable lineage declare` records an upgrade made "
            "elsewhere, allow_unrelated=true uses them all the same",
        )
    return found, related or "unrelated"


def claimed_fingerprint(base: Base) -> Fingerprint | None:
    """What the base's lineage.json says its fingerprint is; None where there is none. To be verified by reading."""
    lineage = read_lineage(base.folder)
    try:
        return lineage and Fingerprint(**lineage["fingerprint"])
    except TypeError as error:
        raise InputError(base.folder / FILE, f"broken fingerprint: {error}") from error
