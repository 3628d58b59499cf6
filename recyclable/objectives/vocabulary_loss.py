"""The loss of a language model's tokens, by a module that has the last layers of student and teacher to itself.

Those layers are not called: their weights go into one fused loss, so that no more than a chunk's logits ever exist.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from torch.nn import functional as F

from recyclable.architectures.heads import LanguageHead
from recyclable.errors import InputError
from recyclable.kernels import (
    Head,
    LossSettings,
    LossSums,
    TaughtLogits,
    TaughtStates,
    distillation_loss,
    loss_of_logits,
    token_losses,
)
from recyclable.ranges import LOSS, phase


class VocabularyLoss(nn.Module):
    """Cross-entropy and divergence from a teacher, summed over tokens, from states [M, H] before the last layers.

    Logits are those of the models, scaled and soft-capped as theirs. The layers stay parts of their models, under whose
    names they are trained and saved; ZeRO-3 gathers their weights, tied or not, for this module's forward and backward
    passes as well (`Objective.borrowed`).
    A last layer that is no plain `nn.Linear` (an adapter on it, a family that is not known) is called instead, and its
    logits exist all at once.

    Args:
        student: what spreads the student's states over its vocabulary.
        teacher: the same of a frozen teacher, None without one. Sizes and vocabularies may differ.

    Raises InputError for logits in bf16 of a last layer that is called.
    """

    def __init__(self, student: LanguageHead, teacher: LanguageHead | None, settings: LossSettings) -> None:
        super().__init__()
        if settings.logits == "bf16" and not student.is_linear:
            raise InputError("logits", "is bf16, but the model's last layer is no plain linear one: expected fp32")
        self._student, self._teacher = student, teacher  # no modules: not a second place for the same parameters
        self._settings = settings

    def borrowed(self) -> Iterator[tuple[nn.Module, nn.Parameter]]:
        """As `Objective.borrowed`."""
        for head in (self._student, self._teacher):
            if head is not None and head.is_linear:
                yield from ((self, parameter) for parameter in head.layer.parameters())

    def forward(
        self, hidden: torch.Tensor, told: torch.Tensor | None, targets: torch.Tensor, each: bool = False
    ) -> LossSums | torch.Tensor:
        """Sums over the tokens of `hidden` [M, H] and the teacher's states `told` [M, Ht], with targets [M].

        Args:
            each: instead of sums, each token's cross-entropy [M], without gradient and without the teacher.
        """
        if each:
            return self._each(hidden, targets)
        with phase(LOSS):
            return self._sums(hidden, told, targets)

    def _sums(self, hidden: torch.Tensor, told: torch.Tensor | None, targets: torch.Tensor) -> LossSums:
        student, teaching, teacher = self._student, self._teacher, None
        if teaching is not None:
            assert told is not None, "a teacher that tells nothing"
            with torch.no_grad():
                linear = teaching.is_linear
                teacher = TaughtStates(told, _fused(teaching)) if linear else TaughtLogits(teaching.logits(told))
        if student.is_linear:
            return distillation_loss(hidden, _fused(student), teacher, targets, self._settings)
        return loss_of_logits(student.logits(hidden).float(), teacher, targets, self._settings)

    @torch.no_grad()
    def _each(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if self._student.is_linear:
            return token_losses(hidden, _fused(self._student), targets)
        return F.cross_entropy(self._student.logits(hidden).float(), targets, reduction="none")


def _fused(head: LanguageHead) -> Head:
    assert isinstance(head.layer, nn.Linear)
    return Head(head.layer.weight, head.bias, head.scale, head.softcap)
