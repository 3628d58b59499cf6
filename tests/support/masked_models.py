"""Masked LMs of three families, small enough to be written out as formulae, and a batch for them."""

from __future__ import annotations

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
