"""Sublayers end where a hook sees the residual stream grow, in every family; elsewhere nothing is made up."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, LAYERS, WIDTH, config, drawn
from torch import nn
from transformers import AutoConfig, AutoModel

from recyclable.architectures.structure import on_meta
from recyclable.architectures.sublayers import sublayer_ends, suffixes

SUFFIXES = {
    **{name: ["attention.output.dense", "output.dense"] for name in ("bert", "roberta", "electra", "deberta-v2")},
    **{name: ["self_attn.o_proj", "mlp.down_proj"] for name in ("llama", "qwen3", "gemma2", "cohere", "granite")},
    "distilbert": ["attention.out_lin", "ffn.lin2"],
    "albert": ["albert_layers.0.attention.dense", "albert_layers.0.ffn_output"],
    "modernbert": ["attn.Wo", "mlp.Wo"],
    "gpt2": ["attn.c_proj", "mlp.c_proj"],
    "opt": ["self_attn.out_proj", "fc2"],
    "gpt_neox": ["attention.dense", "mlp.dense_4h_to_h"],
    "t5": [
        *("layer.0.SelfAttention.o", "layer.1.DenseReluDense.wo"),
        *("layer.1.EncDecAttention.o", "layer.2.DenseReluDense.wo"),
    ],
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_ends_of_a_family_by_name(family: str) -> None:
    model = on_meta(config(family))
    ends = sublayer_ends(model)
    assert suffixes(model, ends) == SUFFIXES[family]
    layers = {"albert": 1, "t5": 2 * LAYERS}.get(family, LAYERS)
    assert sum(not end.attention for end in ends) == layers
    assert sum(end.attention for end in ends) == (layers + LAYERS if family == "t5" else layers)
    assert all(model.get_submodule(end.name) is end.module for end in ends)


@pytest.mark.parametrize("family", FAMILIES)
def test_without_its_sublayers_ends_a_model_lets_the_embeddings_through(family: str) -> None:
    """Where all ends give zero no layer adds anything: tokens no longer see one another."""
    model = drawn(config(family))
    first, second = torch.tensor([[5, 6, 7, 8]]), torch.tensor([[5, 9, 3, 8]])
    more = [{"decoder_input_ids": ids} if family == "t5" else {} for ids in (first, second)]

    def last_token(ids: torch.Tensor, inputs: dict) -> torch.Tensor:
        with torch.no_grad():
            return model(input_ids=ids, **inputs).last_hidden_state[:, -1]

    assert not torch.allclose(last_token(first, more[0]), last_token(second, more[1]), atol=1e-3)
    for end in sublayer_ends(model):
        for parameter in end.module.parameters():
            nn.init.zeros_(parameter)
    assert torch.allclose(last_token(first, more[0]), last_token(second, more[1]), atol=1e-6)


def test_a_feed_forward_network_as_wide_as_the_stream_ends_in_its_second_matrix() -> None:
    model = on_meta(config("bert", intermediate_size=WIDTH))
    assert suffixes(model, sublayer_ends(model)) == SUFFIXES["bert"]


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe", "switch_transformers", "mamba", "falcon_h1", "fnet"])
def test_layers_that_are_built_otherwise_have_no_ends(kind: str) -> None:
    with torch.device("meta"):
        assert sublayer_ends(AutoModel.from_config(AutoConfig.for_model(kind))) == []
