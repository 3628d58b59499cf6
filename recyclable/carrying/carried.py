"""Outdated weights with the base they belong to and the base they go onto, opened and verified in one place."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from recyclable.carrying.adapter_tensors import (
    BaseValues,
    Full,
    full_values,
    moved_full,
    moved_indices,
    taken_places,
    token_dimensions,
)
from recyclable.carrying.named_tokens import names_tokens, with_moved_tokens
from recyclable.carrying.starts import AdapterDifferences, carried_rows
from recyclable.errors import InputError
from recyclable.weights.adapted import AdaptedWeights
from recyclable.weights.base import Base
from recyclable.weights.differences import Aligned, Differences
from recyclable.weights.fingerprint import Fingerprint, tokenizer_digest
from recyclable.weights.lineage import read_lineage
from recyclable.weights.locate import locate
from recyclable.weights.manifest import ADAPTER
from recyclable.weights.provenance import claimed_relation, refuse_early, require_descendant, require_own_base
from recyclable.weights.reader import Reader
from recyclable.weights.store import find
from recyclable.weights.team import ALONE, Team
from recyclable.weights.vocabulary import Rows, align, load_tokenizer


class Carried:
    """Adapted weights on their way from one base to another: their own, a descendant of it, or an unrelated one.

    What manifests and lineages claim is checked when it is made; that files hold what they claim is known after the
    reading, by `verify`.

    Args:
        weights: the outdated weights.
        old: their own base; None: looked for by the names that manifest and lineage have, when it is needed.
        new: the base they go onto.
        allow_unrelated: it need not descend from theirs.
    """

    def __init__(self, weights: AdaptedWeights, old: Base | None, new: Base, allow_unrelated: bool = False) -> None:
        self.weights, self.new, self._allow_unrelated = weights, new, allow_unrelated
        if old is not None:
            refuse_early(weights, old)
            self.old = old
        self.relation = claimed_relation(weights, new, allow_unrelated)
        """How the new base is related to the weights' own: own, recorded, declared or unrelated."""
        if old is None and self.own:
            self.old = new

    @classmethod
    def open(
        cls,
        weights: str | Path,
        old: str | Path | None,
        new: str | Path | Base,
        *,
        store: str | Path | None = None,
        allow_unrelated: bool = False,
    ) -> Carried:
        """By paths and names: weights in a directory or in the store, bases in directories or on the hub."""
        new_base = new if isinstance(new, Base) else Base(locate(new))
        old_base = None if old is None else Base(locate(old))
        if old_base is not None and old_base.folder == new_base.folder:
            old_base = new_base
        opened = AdaptedWeights(find(weights, store), verify=False)
        return cls(opened, old_base, new_base, allow_unrelated)

    @property
    def own(self) -> bool:
        """Whether the weights were tuned on this very base."""
        return self.relation == "own"

    @property
    def at_home(self) -> Carried:
        """The same weights on their own base."""
        return Carried(self.weights, self.old, self.old)

    @cached_property
    def old(self) -> Base:
        """The base that the weights were tuned on; InputError where no recorded name leads to it."""
        tried = list(dict.fromkeys(self._names_of_old()))
        for name in tried:
            try:
                old = Base(locate(name))
                refuse_early(self.weights, old)
            except InputError:
                continue
            return old
        raise InputError(
            self.weights.folder,
            f"needs the base it was tuned on, which is not at {' or '.join(tried)} any more: name it with --old-base "
            "(old_base)",
        )

    def _names_of_old(self) -> Iterator[str]:
        recorded = self.weights.manifest.base
        yield recorded["name"]
        for ancestor in (read_lineage(self.new.folder) or {"ancestors": []})["ancestors"]:
            if ancestor["fingerprint"]["weights"] == recorded["fingerprint"]["weights"]:
                yield ancestor["name"]

    @property
    def reader(self) -> Reader:
        """What reads texts for the weights on the new base."""
        return Reader.of(self.new, self.weights, self.fields)

    @cached_property
    def fields(self) -> dict[str, Any]:
        """The fields of the config that the weights brought along; tokens that they name follow their rows."""
        fields = self.weights.manifest.config
        if not names_tokens(fields) or (rows := self.moved_rows()) is None:
            return fields
        return with_moved_tokens(fields, rows)

    @cached_property
    def rows(self) -> Rows | None:
        """How the rows of embeddings follow their tokens into another vocabulary; None where it is the same."""
        return carried_rows(self.weights, lambda: self.old, self.new)

    def moved_rows(self) -> Rows | None:
        """`rows` where any token came, went or changed its place."""
        return None if self.rows is None or self.rows.unchanged else self.rows

    @property
    def unmoved(self) -> bool:
        """Whether the weights are on their own base, whose rows are where they were."""
        return self.own and self.moved_rows() is None

    @cached_property
    def full(self) -> dict[str, Full]:
        """Name in an adapter's file -> what it takes the place of in both bases; rows are those of the old one."""
        in_new = taken_places(self.weights, self.new)
        in_old = full_values(self.weights, self.old) if in_new else {}
        return {name: each for name, each in in_old.items() if in_new.get(name) == each.base_name}

    @cached_property
    def _moved_full(self) -> dict[str, Full]:
        """The same with the rows of the new base."""
        if (rows := self.moved_rows()) is None:
            return self.full
        tokens = load_tokenizer(self.old.folder)
        return moved_full(self.weights, self.full, self.old, rows, tokens.convert_ids_to_tokens)

    @property
    def new_values(self) -> BaseValues:
        """What the new base has where an adapter's file holds full values."""
        return BaseValues(self.new.hashed, self._moved_full)

    def moved_indices(self) -> dict[str, Any]:
        """The fields of an adapter's config that are others on the new base: rows of trained tokens."""
        if not self.weights.is_adapter or self.moved_rows() is None:
            return {}
        return moved_indices(self.weights, self.full, self._moved_full)

    def adapter_differences(self) -> Differences:
        """An adapter's tensors as differences, their rows and columns aligned by token where the vocabularies differ.

        The old base is read where it has some of them too.
        """
        old = BaseValues(self.old.hashed if self.full else self.new.hashed, self.full)
        differences = AdapterDifferences(self.weights.file(ADAPTER), old)
        if self.rows is None or self.unmoved:
            return differences
        dimensions = token_dimensions(self.weights, self.full, self.old)
        by_row, by_column = (frozenset(n for n, dim in dimensions.items() if dim == side) for side in (0, 1))
        return Aligned(differences, by_row, self.rows.old_row, by_column)

    def other_tokens(self) -> Rows | None:
        """How the rows of the two bases' tokens differ; None where both take the same ids for the same tokens."""
        if tokenizer_digest(self.new) == tokenizer_digest(self.old):
            return None
        rows = align(self.old, self.new)
        return None if rows.unchanged else rows

    def require_same_tokens(self, hint: str) -> None:
        """InputError where the two bases take the same ids for other tokens."""
        if (rows := self.other_tokens()) is not None:
            raise InputError(self.new.folder, f"has another vocabulary than {self.old.folder} ({rows}): {hint}")

    def require_same_shapes(self) -> None:
        """InputError where no straight path leads from one base's weights to the other's."""
        require_same_shapes(self.new, self.old)

    def verify(self, team: Team = ALONE) -> tuple[Fingerprint, str]:
        """After the reading: the new base's fingerprint and its relation to the weights' own; a collective.

        What nobody has read of weights and bases is read now, shared out. A base that was never named nor needed is
        not. Raises InputError where anything is not what manifest and lineage say.
        """
        opened = vars(self).get("old")
        for each in (*self.weights.files(), *([opened.hashed] if opened is not None else []), self.new.hashed):
            each.complete(team=team)
        self.weights.verify()
        found = require_descendant(self.weights, self.new, self._allow_unrelated)
        if opened is not None:
            require_own_base(self.weights, opened)
        return found


def require_same_shapes(base: Base, other: Base) -> None:
    """InputError where no straight path leads from one base's weights to the other's."""
    for name in sorted({*base.names, *other.names}):
        found, wanted = (b.shape(name) if name in b else "missing" for b in (base, other))
        if found != wanted:
            raise InputError(base.folder, f"{name} is {found}, in {other.folder} {wanted}: no path to interpolate on")
