"""Several adapters on one frozen base, each with a task of its own, learning in one forward pass of the base."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from recyclable.adapters.stacked import Rows, Segment, apart
from recyclable.architectures.heads import language_head
from recyclable.data.examples import Batch, model_inputs
from recyclable.kernels import LossSettings
from recyclable.objectives.labelled import LabelledTask
from recyclable.objectives.objective import Ask
from recyclable.objectives.of_task import task_objective
from recyclable.objectives.task_outputs import task_outputs
from recyclable.objectives.token_states import token_states
from recyclable.objectives.vocabulary_loss import VocabularyLoss
from recyclable.tasks.parts.kind import TaskKind

Part = tuple[int, Batch]
"""(adapter, its batch)"""
NOBODY = -1
"""In place of an adapter: the base computes alone, and nothing is learned."""


class StackedTasks(nn.Module):
    """A base with several adapters (`adapters.stacked.stack`), and the tasks that they learn from labels alone.

    Args:
        rows: the stack's.
        kinds: of each adapter's task; over the vocabulary all of them, or none.
        classes: how wide each adapter's logits are.
        pad: the id that fills up texts, behind them.
    """

    def __init__(
        self, host: nn.Module, rows: Rows, kinds: Sequence[TaskKind], classes: Sequence[int], pad: int
    ) -> None:
        super().__init__()
        self.student = host
        self._rows, self._kinds, self._classes, self._pad = rows, list(kinds), list(classes), pad
        self._tasks = [task_objective(host, kind) for kind in kinds]
        self._head = language_head(host) if kinds[0].over_vocabulary else None
        self._of_tokens = VocabularyLoss(self._head, None, LossSettings()) if self._head is not None else None

    def counts(self, part: Part) -> int:
        """What a part's summed loss is divided by."""
        return self._tasks[part[0]].counts(part[1])["task"]

    def forward(
        self,
        batch: Batch | None = None,
        *,
        adapter: int = 0,
        predict: bool = False,
        ask: Ask | None = None,
        parts: Sequence[Part] = (),
    ) -> Any:
        """One adapter's predictions, or what else its model is asked; or each part's summed loss, [parts] (fp32)."""
        if parts:
            return torch.stack(self._sums(parts))
        self._rows.segments = [Segment(adapter, 0, 1)]  # whatever the rows, all of them
        return self._tasks[adapter](batch, predict=predict, ask=ask)

    def _sums(self, parts: Sequence[Part]) -> list[torch.Tensor]:
        joint, self._rows.segments = joined(parts, self._pad)
        if self._head is not None and self._of_tokens is not None:
            states = token_states(self._head, joint, narrowed=False).hidden
            told = states.split([len(batch["targets"]) for _, batch in parts])
            pairs = zip(told, parts, strict=True)
            return [self._of_tokens(hidden, None, batch["targets"]).loss for hidden, (_, batch) in pairs]
        logits, sums = task_outputs(self.student, joint).logits, []
        for (adapter, batch), piece in zip(parts, apart(logits, self._rows.segments), strict=True):
            if adapter == NOBODY:
                sums.append(0.0 * piece.float().sum())
                continue
            own = piece[..., : self._classes[adapter]]
            if own.dim() == 3:  # of each token
                own = own[:, : batch["input_ids"].shape[1]]
            task = self._tasks[adapter]
            assert isinstance(task, LabelledTask)
            sums.append(task.sums_of(own, batch)["task"])
        return sums


def joined(parts: Sequence[Part], pad: int) -> tuple[Batch, list[Segment]]:
    """The batches below each other, filled up to the longest, and whose rows are where.

    Only what models read is joined, and the `positions` [M] of tokens to be told, by the joint batch's lengths.
    """
    batches = [batch for _, batch in parts]
    ends = torch.tensor([0, *(len(batch["input_ids"]) for batch in batches)]).cumsum(0).tolist()
    segments = [Segment(adapter, ends[i], ends[i + 1]) for i, (adapter, _) in enumerate(parts)]
    joint: Batch = {}
    for name in model_inputs(batches[0]):
        longest = max(batch[name].shape[1] for batch in batches)
        value = pad if name.endswith("input_ids") else 0
        filled = [F.pad(batch[name], (0, longest - batch[name].shape[1]), value=value) for batch in batches]
        joint[name] = torch.cat(filled)
    if "positions" in batches[0]:
        ids = "decoder_input_ids" if "decoder_input_ids" in joint else "input_ids"
        longest, positions = joint[ids].shape[1], []
        for batch, start in zip(batches, ends, strict=False):
            rows, columns = (f(batch["positions"], batch[ids].shape[1]) for f in (torch.floor_divide, torch.remainder))
            positions.append((rows + start) * longest + columns)
        joint["positions"] = torch.cat(positions)
    return joint, segments
