"""Attention in bf16 on a CPU: written out for few keys, of models that may, and the formula's values and gradients."""

from __future__ import annotations

import pytest
import torch
from decoders import decoder, decoder_config
from torch.profiler import profile
from transformers import BertConfig, BertModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from recyclable.architectures import short_attention
from recyclable.architectures.attention import Machine, set_attention
from recyclable.architectures.last_layer import narrow
from recyclable.architectures.read_tokens import read_only
from recyclable.architectures.short_attention import written_out

SMALL = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


def attend(module, query, key, value, mask, **more):
    return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, mask, **more)[0]


def takes_fused(call) -> bool:
    with profile() as seen:
        call()
    return any("flash_attention_for_cpu" in event.key for event in seen.key_averages())


@pytest.fixture(scope="module")
def llama():
    return decoder(decoder_config("llama"))


@pytest.mark.parametrize(
    ("wanted", "dtype", "keys", "fused"),
    [
        (None, torch.bfloat16, 256, False),
        (None, torch.bfloat16, 257, True),
        (None, torch.float32, 64, True),
        ("sdpa", torch.bfloat16, 64, True),
    ],
)
def test_it_is_taken_by_shape_and_precision_where_nothing_is_named(llama, wanted, dtype, keys, fused):
    set_attention(llama, wanted, True, Machine())
    module = llama.model.layers[0].self_attn
    query, key, value = (torch.randn(1, 4, keys, 8, dtype=dtype) for _ in range(3))
    assert takes_fused(lambda: attend(module, query, key, value, None)) == fused


def test_other_models_compute_as_ever(llama):
    set_attention(llama, None, True, Machine())
    other = BertModel(BertConfig(**SMALL)).bfloat16().eval()
    assert takes_fused(lambda: other(torch.ones(1, 8, dtype=torch.long)))


@pytest.mark.parametrize("mask", ["none", "causal", "bool", "added", "one row for all"])
def test_values_and_gradients_are_those_of_the_formula(llama, mask):
    set_attention(llama, None, True, Machine())
    module = llama.model.layers[0].self_attn
    torch.manual_seed(0)
    inputs = [torch.randn(2, heads, 16, 8, dtype=torch.bfloat16, requires_grad=True) for heads in (4, 2, 2)]
    seen = torch.rand(2, 1, 16, 16) < 0.7
    seen[..., 0] = True
    told = {
        **{"none": None, "causal": None, "bool": seen, "one row for all": seen[:, :, :1]},
        "added": torch.zeros(2, 1, 16, 16).masked_fill(~seen, torch.finfo(torch.bfloat16).min).bfloat16(),
    }[mask]
    found = attend(module, *inputs, told, is_causal=mask == "causal", scaling=0.5)
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    query, key, value = (tensor.repeat_interleave(4 // tensor.shape[1], 1) for tensor in exact)
    allowed = {"none": torch.ones(16, 16).bool(), "causal": torch.ones(16, 16).tril().bool()}
    allowed |= {"one row for all": seen[:, :, :1]}
    scores = (query @ key.mT * 0.5).masked_fill(~allowed.get(mask, seen), -torch.inf)
    right = (scores.softmax(-1) @ value).transpose(1, 2)
    assert (found.double() - right).norm() < 0.01 * right.norm()
    given = torch.randn_like(found)
    for own, each in zip(
        torch.autograd.grad(found, inputs, given), torch.autograd.grad(right, exact, given.double()), strict=True
    ):
        assert (own.double() - each).norm() < 0.015 * each.norm()


def test_a_text_that_is_padding_alone_is_finite():
    query = torch.randn(1, 2, 4, 8, dtype=torch.bfloat16, requires_grad=True)
    found = written_out(query, query, query, torch.zeros(1, 1, 4, 4, dtype=torch.bool))
    found.sum().backward()
    assert found.isfinite().all() and query.grad.isfinite().all()


def test_probabilities_are_dropped():
    ones = torch.ones(1, 1, 64, 8, dtype=torch.bfloat16)
    torch.manual_seed(0)
    found = written_out(ones, ones, ones, dropout=0.5)
    assert 0.8 < float(found.mean()) < 1.2 and found.std() > 0.05


@pytest.mark.parametrize("narrow_first", [False, True])
def test_a_last_layer_that_reads_few_tokens_still_does(narrow_first, monkeypatch):
    torch.manual_seed(0)
    model = BertModel(BertConfig(**SMALL), add_pooling_layer=False).bfloat16().eval()
    changes = [narrow, lambda it: set_attention(it, None, True, Machine())]
    for change in changes if narrow_first else changes[::-1]:
        change(model)
    queries = []

    def noting(query, *given):
        queries.append(query.shape[2])
        return written_out(query, *given)

    monkeypatch.setattr(short_attention, "written_out", noting)
    ids, positions = torch.randint(50, (2, 12)), torch.tensor([1, 20])
    whole = model(ids)[0]
    with read_only(positions, *ids.shape):
        few = model(ids)[0]
    assert queries == [12, 12, 12, 1]
    torch.testing.assert_close(few.flatten(0, 1)[positions], whole.flatten(0, 1)[positions], atol=0.03, rtol=0.03)
