"""Masked language modelling gives the loss that transformers computes over whole sequences."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    DistilBertConfig,
    DistilBertForMaskedLM,
    PreTrainedModel,
    RobertaConfig,
    RobertaForMaskedLM,
)

from recyclable.objectives.masked_lm import MaskedLM

SIZE = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 16,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "initializer_range": 0.3,
}


def bert() -> PreTrainedModel:
    return BertForMaskedLM(BertConfig(**SIZE))


def roberta() -> PreTrainedModel:
    return RobertaForMaskedLM(RobertaConfig(**SIZE, pad_token_id=1, type_vocab_size=1))


def distilbert() -> PreTrainedModel:
    size = {"vocab_size": 40, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32, "max_position_embeddings": 16}
    return DistilBertForMaskedLM(DistilBertConfig(**size, dropout=0.0, attention_dropout=0.0))


def batch(masked: float = 0.3) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """What the collator makes, and the labels transformers wants for the same (-100 where nothing is masked)."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 40, (3, 10), generator=generator)
    chosen = torch.rand(3, 10, generator=generator) < masked
    labels = ids.masked_fill(~chosen, -100)
    made = {
        "input_ids": ids.masked_fill(chosen, 4),
        "attention_mask": torch.ones_like(ids),
        "positions": chosen.flatten().nonzero().squeeze(1),
        "targets": ids[chosen],
    }
    return made, labels


@pytest.mark.parametrize("family", [bert, roberta, distilbert])
def test_loss_and_gradients_are_those_of_transformers(family) -> None:
    torch.manual_seed(0)
    model = family().eval()
    data, labels = batch()
    inputs = {name: data[name] for name in ("input_ids", "attention_mask")}

    made = MaskedLM(model)
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
    made = MaskedLM(bert().eval())
    assert made.counts(data) == {"mlm": 0}
    assert made(data)["mlm"].item() == 0
