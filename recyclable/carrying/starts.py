"""Where weights start: outdated weights carried onto a new base.

Initialization-based recycling of "Recyclable Tuning for Continual Pre-training" (arXiv 2305.08702, section 5.1):
theta_{i+1} + D_i for full fine-tuning, the old adapter on M_{i+1} otherwise. A tensor the base has travels as a
difference and is added; a tensor it lacks (classifier, fresh pooler) is copied verbatim.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from recyclable.errors import InputError
from recyclable.weights.adapted import AdaptedWeights
from recyclable.weights.algebra import add, subtract
from recyclable.weights.base import Base
from recyclable.weights.checkpoint_files import Ranged
from recyclable.weights.delta import Delta
from recyclable.weights.differences import Dare, Differences, Scaled, Ties, Total
from recyclable.weights.fingerprint import tokenizer_digest
from recyclable.weights.vocabulary import Rows, align, vocabulary_tensors

_PROPORTIONAL = ("lora_B", "lora_embedding_B", "bottleneck_up")
"""What an adapter's effect is proportional to, by parts of its tensors' names."""


def carried_rows(weights: AdaptedWeights, old: Callable[[], Base], new: Base) -> Rows | None:
    """How rows of embeddings follow their tokens onto `new`; None where no tensor needs it.

    Args:
        old: gives the base that the weights belong to; asked only where vocabularies or numbers of rows differ.
    """
    if weights.is_adapter or not (names := vocabulary_tensors(new).intersection(weights.delta.names)):
        return None
    same = weights.manifest.base["fingerprint"]["tokenizer"] == tokenizer_digest(new)
    if same and all(weights.delta.shape(name)[0] == new.shape(name)[0] for name in names):
        return None
    return align(old(), new)


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

    `modules_to_save` hold full values: where they belong to the base (layer norms), the old base's are subtracted; the
    adapter's own tensors and the head are what they are.

    Args:
        base_name_of: PEFT name -> canonical name, of the tensors that belong to the base.
    """

    def __init__(self, adapter: Ranged, old: Ranged, base_name_of: Mapping[str, str]) -> None:
        self.adapter, self.old, self.base_name_of = adapter, old, base_name_of

    @property
    def names(self) -> list[str]:
        """Sorted."""
        return sorted(self.adapter.names)

    def shape(self, name: str) -> tuple[int, ...]:
        """The adapter's."""
        return self.adapter.shape(name)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """fp32."""
        tensor = self.adapter.read(name, start, stop)
        if name not in self.base_name_of:
            return tensor.float()
        return subtract(tensor, self.old.read(self.base_name_of[name], start, stop))


def strength_tensors(weights: AdaptedWeights, differences: AdapterDifferences) -> list[str]:
    """The tensors of an adapter that its strength multiplies; InputError for a kind that has none."""
    factors = [name for name in differences.names if set(name.split(".")) & set(_PROPORTIONAL)]
    if not factors:
        raise InputError(weights.folder, "is neither a LoRA nor a bottleneck adapter: it has no strength")
    return [*factors, *differences.base_name_of]


def start_adapter(
    new: Ranged, differences: Differences, name: str, base_name: str | None, begin: int, end: int
) -> torch.Tensor:
    """Elements [begin, end) of one of an adapter's tensors on the new base, flat, fp32.

    Args:
        differences: `AdapterDifferences`, or made from them.
        base_name: the base's tensor that it is a difference from, if any.
    """
    difference = differences.read(name, begin, end)
    if base_name is None:
        return difference
    return add(new.read(base_name, begin, end), difference, dtype=torch.float32)
