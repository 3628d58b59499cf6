"""Masked language modelling gives the loss that transformers computes over whole sequences."""

from __future__ import annotations

import pytest
import torch
from masked_models import batch, bert, distilbert, roberta

from recyclable.objectives.token_loss import TokenLoss


@pytest.mark.parametrize("family", [bert, roberta, distilbert])
def test_loss_and_gradients_are_those_of_transformers(family) -> None:
    torch.manual_seed(0)
    model = family().eval()
    data, labels = batch()
    inputs = {name: data[name] for name in ("input_ids", "attention_mask")}

    made = TokenLoss(model, "mlm")
    assert made.counts(data) == {"mlm": int((labels != -100).sum())}
    got = made(data)["mlm"] / made.counts(data)["mlm"]
    got.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    wanted = model(**inputs, labels=labels).loss
    wanted.backward()
    assert got.item() == pytest.approx(wanted.item(), rel=1e-6)
    assert got.item() > 1
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, found[name], atol=1e-6), name


def test_a_batch_without_a_masked_token_costs_nothing() -> None:
    data, _ = batch(masked=0.0)
    made = TokenLoss(bert().eval(), "mlm")
    assert made.counts(data) == {"mlm": 0}
    assert made(data)["mlm"].item() == 0
