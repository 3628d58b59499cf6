"""Where shapes depend on values, a trace takes those of masks that choose everything, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel, T5Config

from recyclable.models.build import auto_class, structure
from recyclable.objectives.labelled import LabelledTask
from recyclable.objectives.objective import Objective
from recyclable.planning.trace import trace
from recyclable.tasks.classification import Classification

ROWS, LENGTH, WIDTH = 3, 5, 4


def chosen_by_a_mask(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return x[mask]


def by_a_mask_and_a_number(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return x[mask, 1]


def behind_whole_dimensions(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return x.permute(2, 0, 1)[:, mask]


def put_where_a_mask_is(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    made = torch.zeros_like(x)
    made[mask] = x[mask]
    return made


def by_the_places(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return x.flatten(0, 1)[mask.flatten().nonzero().squeeze(1)]


class Chooses(Objective):
    """Half the squares of what is chosen of a product."""

    def __init__(self, choose: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.student, self.weights = nn.Linear(WIDTH, WIDTH, bias=False, device="meta"), {"loss": 1.0}
        self.choose, self.shapes = choose, list[torch.Size]()

    def counts(self, batch: dict[str, torch.Tensor]) -> dict[str, int]:
        return {"loss": 1}

    def sums(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        found = self.choose(self.student(batch["x"]), batch["mask"])
        self.shapes.append(found.shape)
        return {"loss": found.square().sum()}


@pytest.mark.parametrize(
    "choose",
    [chosen_by_a_mask, by_a_mask_and_a_number, behind_whole_dimensions, put_where_a_mask_is, by_the_places],
)
def test_a_mask_chooses_everything(choose: Any) -> None:
    x, everything = torch.zeros(ROWS, LENGTH, WIDTH), torch.ones(ROWS, LENGTH, dtype=torch.bool)
    objective = Chooses(choose)
    found = trace(objective, {"x": x, "mask": ~everything})
    assert objective.shapes == [choose(x, everything).shape]
    assert found.order and found.done[-1] == 4 * WIDTH * WIDTH


def t5() -> PreTrainedModel:
    config = T5Config(vocab_size=50, d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4, num_labels=3)
    config.decoder_start_token_id = config.pad_token_id
    return structure(config, auto_class("SequenceClassification"))


def test_a_classifier_that_looks_for_the_end_of_a_text_is_followed_through_all_its_weights() -> None:
    kind = Classification()
    objective = LabelledTask(t5(), kind)
    found = trace(objective, kind.full_batch(ROWS, 8, 3, objective.student.config))
    told = {name for name, _ in found.order}
    assert told == {name for name, _ in objective.named_parameters()}
