"""What a model of a task says of a batch, its last layer computed only where the model's own head looks."""

from __future__ import annotations

from typing import Any

from torch import nn

from recyclable.architectures.read_tokens import read_by_head
from recyclable.data.examples import Batch, model_inputs


def task_outputs(model: nn.Module, batch: Batch, states: bool = False) -> Any:
    """The model's output for a batch.

    Args:
        model: `narrow`ed where that pays.
        states: with hidden states, of which the last layer's are of no use.
    """
    with read_by_head(model):
        return model(**model_inputs(batch), output_hidden_states=states)
