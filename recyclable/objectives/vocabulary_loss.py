"""The loss of a language model's tokens, by a module that has the last layers of student and teacher to itself.

Those layers are not called: their weights go into one fused loss, so that no more than a chunk's logits ever exist.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from recyclable.kernels import (
    DenseTeacher,
    Head,
    LossSettings,
    LossSums,
    OnlineTeacher,
    distillation_loss,
    loss_of_logits,
)


class VocabularyLoss(nn.Module):
    """Cross-entropy and divergence from a teacher, summed over tokens, from states [M, H] before the last layers.

    The layers stay parts of their models, under whose names they are trained and saved; ZeRO-3 gathers their weights,
    tied or not, for this module's forward and backward passes as well (`Objective.borrowed`).
    A last layer that is no plain `nn.Linear` (an adapter on it, a family that is not known) is called instead, and its
    logits exist all at once.

    Args:
        student: the layer that spreads the student's states over its vocabulary.
        teacher: the same of a frozen teacher, None without one. Sizes and vocabularies may differ.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module | None, settings: LossSettings) -> None:
        super().__init__()
        self._layers = student, teacher  # in a tuple: not a second place for the same parameters
        self._settings = settings

    def borrowed(self) -> Iterator[tuple[nn.Module, nn.Parameter]]:
        """As `Objective.borrowed`."""
        for layer in self._layers:
            if _is_linear(layer):
                yield from ((self, parameter) for parameter in layer.parameters())

    def forward(self, hidden: torch.Tensor, told: torch.Tensor | None, targets: torch.Tensor) -> LossSums:
        """Sums over the tokens of `hidden` [M, H] and the teacher's states `told` [M, Ht], with targets [M]."""
        layer, teaching = self._layers
        teacher = None
        if teaching is not None:
            with torch.no_grad():
                teacher = OnlineTeacher(told, _head(teaching)) if _is_linear(teaching) else DenseTeacher(teaching(told))
        if _is_linear(layer):
            return distillation_loss(hidden, _head(layer), teacher, targets, self._settings)
        return loss_of_logits(layer(hidden).float(), teacher, targets, self._settings)


def _is_linear(layer: nn.Module | None) -> bool:
    """Whether the layer is hidden @ weight.T + bias: subclasses may do otherwise."""
    return type(layer) is nn.Linear


def _head(layer: nn.Linear) -> Head:
    return Head(layer.weight, layer.bias)
