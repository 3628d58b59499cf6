"""Where weights start: outdated weights carried onto a new base.

Initialization-based recycling of "Recyclable Tuning for Continual Pre-training" (arXiv 2305.08702, section 5.1):
theta_{i+1} + D_i for full fine-tuning, the old adapter on M_{i+1} otherwise. A tensor the base has travels as a
difference and is added; a tensor it lacks (classifier, fresh pooler) is copied verbatim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from recyclable.carrying.adapter_tensors import on_vocabulary, same_number_of_tokens
from recyclable.errors import InputError
from recyclable.weights.adapted import AdaptedWeights
from recyclable.weights.algebra import add, subtract
from recyclable.weights.base import Base
from recyclable.weights.checkpoint_files import Ranged
from recyclable.weights.delta import Delta
from recyclable.weights.differences import Dare, Differences, Scaled, Ties, Total
from recyclable.weights.fingerprint import tokenizer_digest
from recyclable.weights.vocabulary import Rows, align, in_place, vocabulary_tensors


def carried_rows(weights: AdaptedWeights, old: Callable[[], Base], new: Base) -> Rows | None:
    """How rows of embeddings follow their tokens onto `new`; None where no tensor needs it.

    Args:
        old: gives the base that the weights belong to; asked only where vocabularies or numbers of rows differ.

    Raises InputError for weights that read with a tokenizer of their own, whose ids stay, where the rows have changed.
    """
    if weights.is_adapter:
        names = frozenset(on_vocabulary(weights, new).values())
        same_number = same_number_of_tokens(weights, new) or all(old().shape(n) == new.shape(n) for n in names)
    else:
        names = vocabulary_tensors(new).intersection(weights.delta.names)
        same_number = all(weights.delta.shape(name)[0] == new.shape(name)[0] for name in names)
    same_tokens = weights.manifest.base["fingerprint"]["tokenizer"] == tokenizer_digest(new)
    if (same_tokens and same_number) or (not names and weights.tokenizer is None):
        return None
    rows = align(old(), new)
    if weights.tokenizer is None:
        return rows
    if not rows.unchanged:
        hint = f"{weights.folder} reads with a tokenizer of its own, which has them in the old rows"
        raise InputError(new.folder, f"has another vocabulary than {old().folder} ({rows}): {hint}")
    return None if same_number else in_place(old(), new)


def transformed(
    several: Sequence[Differences],
    left_out: frozenset[str],
    *,
    scale: float = 1.0,
    ties: float | None = None,
    dare: float | None = None,
    seed: int = 0,
) -> Differences:
    """Differences merged (TIES, else summed), thinned (DARE) and scaled, in this order.

    Args:
        left_out: tensors whose difference is dropped.
        ties: density; dare: drop rate; see `weights.differences`.
    """
    result = several[0] if len(several) == 1 else Total(several)
    if ties is not None:
        result = Ties(several, ties)
    if dare is not None:
        result = Dare(result, dare, seed)
    if scale != 1.0 or left_out:
        result = Scaled(result, {name: 0.0 if name in left_out else scale for name in result.names})
    return result


def start(
    new: Ranged,
    differences: Differences,
    name: str,
    begin: int,
    end: int | None,
    dtype: torch.dtype | None = None,
    own: bool = False,
) -> torch.Tensor:
    """Elements [begin, end) of theta_{i+1} + D_i, flat, rounded once to `dtype` (None: the new base's).

    Args:
        own: the weights were tuned on this very base: an exact delta gives them back bit for bit.
    """
    base = new.read(name, begin, end)
    if own and isinstance(differences, Delta):
        return differences.restore(name, base, begin, end).to(dtype or differences.tuned_dtype(name))
    return add(base, differences.read(name, begin, end), dtype=dtype)


class AdapterDifferences:
    """An adapter's tensors as differences, by their names in PEFT's file.

    From full values of the base's own tensors (`adapter_tensors.full_values`) the old base's are subtracted; the
    adapter's own tensors and the head are what they are.

    Args:
        old: what the old base has where the adapter holds full values.
    """

    def __init__(self, adapter: Ranged, old: Ranged) -> None:
        self.adapter, self.old = adapter, old

    @property
    def names(self) -> list[str]:
        """Sorted."""
        return sorted(self.adapter.names)

    def shape(self, name: str) -> tuple[int, ...]:
        """The adapter's."""
        return self.adapter.shape(name)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """fp32; places and indices as they are."""
        tensor = self.as_stored(name, start, stop)
        return subtract(tensor, self.old.read(name, start, stop)) if name in self.old else tensor

    def as_stored(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Full values where the adapter has these."""
        tensor = self.adapter.read(name, start, stop)
        return tensor.float() if tensor.is_floating_point() else tensor


def start_adapter(
    new: Ranged, differences: Differences, name: str, begin: int, end: int, own: bool = False
) -> torch.Tensor:
    """Elements [begin, end) of one of an adapter's tensors on the new base, flat, fp32.

    Args:
        new: what the new base has where the adapter holds full values, by the names in PEFT's file.
        differences: `AdapterDifferences`, or made from them.
        own: the weights were tuned on this very base: unchanged they are what the file has, bit for bit.
    """
    if own and isinstance(differences, AdapterDifferences):
        return differences.as_stored(name, begin, end)
    difference = differences.read(name, begin, end)
    if name not in new:
        return difference
    return add(new.read(name, begin, end), difference, dtype=torch.float32)
