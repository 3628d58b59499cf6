"""Where weights start: outdated weights carried onto a new base.

Initialization-based recycling of "Recyclable Tuning for Continual Pre-training" (arXiv 2305.08702, section 5.1):
theta_{i+1} + D_i for full fine-tuning, the old adapter on M_{i+1} otherwise. A tensor the base has travels as a
difference and is added; a tensor it lacks (classifier, fresh pooler) is copied verbatim.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch

from recyclable.errors import InputError
from recyclable.weights.adapted import AdaptedWeights
from recyclable.weights.algebra import add, subtract
from recyclable.weights.base import Base
from recyclable.weights.checkpoint_files import Ranged
from recyclable.weights.delta import Delta
from recyclable.weights.differences import Aligned, Dare, Differences, Scaled, Ties, Total
from recyclable.weights.vocabulary import Rows, align, vocabulary_tensors


class Tensors(Protocol):
    """Canonical name -> tensor; `weights.base.Base` is one."""

    def __contains__(self, name: str) -> bool: ...

    def __getitem__(self, name: str) -> torch.Tensor: ...


def carried(weights: AdaptedWeights, old: Base | None, new: Base, tokenizer: str) -> tuple[Differences, Rows | None]:
    """The differences of outdated weights as `new` has tensors for them.

    Args:
        old: the base they belong to; needed where the vocabularies differ.
        tokenizer: digest of the new base's tokenizer.

    Returns the differences, and how rows were aligned where the tokenizers differ, else None. Raises InputError when
    they differ and `old` is None.
    """
    delta, vocabulary = weights.delta, vocabulary_tensors(new)
    if weights.manifest.base["fingerprint"]["tokenizer"] == tokenizer or not vocabulary.intersection(delta.names):
        return delta, None
    if old is None:
        raise InputError(
            weights.folder,
            f"its base has another tokenizer than {new.folder}, and the old base is needed to align rows by token: "
            "name it with --old-base",
        )
    rows = align(old, new)
    return Aligned(delta, vocabulary, rows.old_row), rows


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
    return Scaled(result, scale, left_out) if scale != 1.0 or left_out else result


def start(
    new: Ranged, differences: Differences, name: str, begin: int, end: int | None, dtype: torch.dtype | None, own: bool
) -> torch.Tensor:
    """Elements [begin, end) of theta_{i+1} + D_i, flat, rounded once to `dtype` (None: the new base's).

    Args:
        own: the weights were tuned on this very base: an exact delta gives them back bit for bit.
    """
    base = new.read(name, begin, end)
    if own and isinstance(differences, Delta):
        return differences.restore(name, base, begin, end).to(dtype or differences.tuned_dtype(name))
    return add(base, differences.read(name, begin, end), dtype=dtype)


def start_adapter(
    old: Ranged, new: Ranged, adapter: Ranged, name: str, base_name: str, begin: int, end: int
) -> torch.Tensor:
    """Elements [begin, end) of one of an adapter's tensors on the new base, flat, fp32; see `outdated_adapter`.

    Args:
        base_name: the canonical name that the tensor would have in the base.
    """
    tensor = adapter.read(name, begin, end)
    if base_name not in old or base_name not in new:
        return tensor.float()
    shift = subtract(tensor, old.read(base_name, begin, end))
    return add(new.read(base_name, begin, end), shift, dtype=torch.float32)


def outdated_adapter(
    old: Tensors, new: Tensors, adapter: Mapping[str, torch.Tensor], base_name_of: Mapping[str, str]
) -> dict[str, torch.Tensor]:
    """An adapter's weights on the new base.

    `modules_to_save` hold full values: where they belong to the base (layer norms), what the upgrade changed is
    added; the adapter's own tensors and the head go over verbatim.

    Args:
        adapter: PEFT name -> tensor.
        base_name_of: PEFT name -> canonical name it would have in the base.
    """
    for name, tensor in adapter.items():
        if (base_name := base_name_of[name]) in old and base_name in new and new[base_name].shape != tensor.shape:
            shape = tuple(new[base_name].shape)
            raise InputError(
                name, f"is {tuple(tensor.shape)} in the adapter, {shape} in the new base: cannot be carried"
            )
    return {
        name: add(new[base_name], subtract(tensor, old[base_name]))
        if (base_name := base_name_of[name]) in old and base_name in new
        else tensor
        for name, tensor in adapter.items()
    }
