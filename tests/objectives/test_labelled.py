"""Labelled tasks: cross-entropy and squared error as transformers computes them."""

from __future__ import annotations

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from recyclable.objectives.labelled import LabelledTask
from recyclable.tasks.classification import Classification
from recyclable.tasks.regression import Regression


@pytest.mark.parametrize("labels", [2, 3, 1])
def test_the_mean_is_the_loss_of_transformers(labels: int) -> None:
    torch.manual_seed(0)
    size = {"vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(**size, intermediate_size=32, num_labels=labels, initializer_range=0.5)
    model = BertForSequenceClassification(config).eval()
    wanted = torch.randn(4) if labels == 1 else torch.randint(labels, (4,))
    data = {"input_ids": torch.randint(5, 30, (4, 6)), "attention_mask": torch.ones(4, 6).long(), "labels": wanted}
    made = LabelledTask(model, Regression() if labels == 1 else Classification())
    assert made.counts(data) == {"task": 4}
    assert made(data)["task"].item() / 4 == pytest.approx(model(**data).loss.item(), rel=1e-6)
    assert torch.equal(made(data, predict=True), model(**{k: v for k, v in data.items() if k != "labels"}).logits)


def test_one_number_per_example_is_not_broadcast() -> None:
    assert Regression().loss_sum(torch.tensor([[1.0], [2.0]]), torch.tensor([1.0, 4.0])).item() == 4.0
