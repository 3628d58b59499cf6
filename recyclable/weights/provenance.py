"""Decides whether adapted weights may go onto a base: their own base, or a recorded descendant of it."""

from __future__ import annotations

from recyclable.errors import InputError
from recyclable.weights.adapted import AdaptedWeights
from recyclable.weights.base import Base
from recyclable.weights.fingerprint import Fingerprint, config_digest, fingerprint, tokenizer_digest
from recyclable.weights.lineage import FILE, read_lineage, relation


def require_own_base(weights: AdaptedWeights, base: Base, found: Fingerprint | None = None) -> Fingerprint:
    """The base's fingerprint if the weights were tuned on exactly this base, else InputError.

    Args:
        found: the base's fingerprint where it is known already.
    """
    found = found or fingerprint(base)
    recorded = weights.manifest.base
    wanted = Fingerprint.recorded(recorded["fingerprint"], base)
    for part in ("weights", "tokenizer", "config"):
        if (got := getattr(found, part)) != getattr(wanted, part):
            raise InputError(
                weights.folder,
                f"belongs to base {recorded.get('name')!r} ({part} {getattr(wanted, part)[:12]}), "
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
            "elsewhere, allow_unrelated (--allow-unrelated) uses them all the same",
        )
    return found, related or "unrelated"


def claimed_relation(weights: AdaptedWeights, new: Base, allow_unrelated: bool = False) -> str:
    """The relation of `require_descendant` by what lineage.json claims, before anything is loaded.

    A claim that does not fit is looked into at once; a base without one is taken for the weights' own if tokenizer and
    config are. `carrying.carried.Carried.verify` has the last word.
    """
    if allow_unrelated and claimed_fingerprint(new) is None:  # a stranger may have the same tokenizer and config
        return require_descendant(weights, new, allow_unrelated)[1]
    own = _own_but_for_weights(weights, new)
    tuned_on = Fingerprint.recorded(weights.manifest.base["fingerprint"], new)
    claim = claimed_fingerprint(new) or (own if own == tuned_on else None)
    try:
        return require_descendant(weights, new, allow_unrelated, claim)[1]
    except InputError:
        return require_descendant(weights, new, allow_unrelated)[1]


def refuse_early(weights: AdaptedWeights, old: Base) -> None:
    """Raise before anything is loaded what `require_own_base` would raise, where that can be known.

    Tokenizer and config are compared; a base whose lineage.json claims other weights is looked into at once.
    """
    claim, own = claimed_fingerprint(old), _own_but_for_weights(weights, old)
    require_own_base(weights, old, own if claim is None or claim.weights == own.weights else None)


def _own_but_for_weights(weights: AdaptedWeights, base: Base) -> Fingerprint:
    """The base's fingerprint if its tensors are those that the weights were tuned on."""
    wanted = weights.manifest.base["fingerprint"]["weights"]
    return Fingerprint(wanted, tokenizer_digest(base), config_digest(base))


def claimed_fingerprint(base: Base) -> Fingerprint | None:
    """What the base's lineage.json says its fingerprint is; None where there is none. To be verified by reading."""
    lineage = read_lineage(base.folder)
    try:
        return None if lineage is None else Fingerprint.recorded(lineage["fingerprint"], base)
    except TypeError as error:
        raise InputError(base.folder / FILE, f"broken fingerprint: {error}") from error
