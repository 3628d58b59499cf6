"""Tensors find their layer group in the spellings of several architectures."""

from __future__ import annotations

import pytest
from transformers import AutoConfig, AutoModel

from recyclable import models
from recyclable.analysis.layers import by_layer, layer_of


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("embeddings.word_embeddings.weight", "embeddings"),
        ("embeddings.LayerNorm.bias", "embeddings"),
        ("wte.weight", "embeddings"),
        ("embed_tokens.weight", "embeddings"),
        ("encoder.rel_embeddings.weight", "embeddings"),
        ("encoder.layer.0.attention.self.query.weight", "layer 0"),
        ("transformer.layer.11.ffn.lin1.bias", "layer 11"),
        ("layers.3.mlp.Wi.weight", "layer 3"),
        ("h.7.attn.c_attn.weight", "layer 7"),
        ("encoder.layer.2.attention.self.distance_embedding.weight", "layer 2"),
        ("final_norm.weight", "other"),
        ("ln_f.bias", "other"),
        ("lm_head.weight", "other"),
    ],
)
def test_names_of_many_spellings(name: str, layer: str) -> None:
    assert layer_of(name) == layer


def test_groups_come_in_model_order_whatever_the_names_order() -> None:
    names = ["norm.weight", "layers.10.a.weight", "layers.2.a.weight", "layers.2.a.bias", "embed_tokens.weight"]
    assert by_layer(names) == {
        "embeddings": ["embed_tokens.weight"],
        "layer 2": ["layers.2.a.weight", "layers.2.a.bias"],
        "layer 10": ["layers.10.a.weight"],
        "other": ["norm.weight"],
    }


@pytest.mark.parametrize(
    "kind", ["bert", "roberta", "distilbert", "electra", "deberta-v2", "modernbert", "gpt2", "llama"]
)
def test_every_layer_of_real_architectures_is_found(kind: str) -> None:
    config = AutoConfig.for_model(kind)
    model = models.structure(config, AutoModel)
    groups = by_layer(models.canonical_names(model))
    numbered = [group for group in groups if group.startswith("layer ")]
    assert numbered == [f"layer {i}" for i in range(config.num_hidden_layers)]
    assert groups["embeddings"] and len({len(groups[group]) for group in numbered}) <= 2
