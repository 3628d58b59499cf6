"""Attention by what a machine has: a pure function of it, so that every machine can be asked about here."""

from __future__ import annotations

import pytest
import torch
from decoders import decoder, decoder_config
from torch.profiler import profile
from transformers import BertConfig, BertForMaskedLM, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from recyclable.architectures.attention import Machine, attention_of, fastest, set_attention, this_machine
from recyclable.errors import InputError

BOTH = frozenset({"flash_attention_2", "flash_attention_3"})
HOPPER, AMPERE, TURING = (Machine(capability, BOTH) for capability in ((9, 0), (8, 6), (7, 5)))


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return decoder(decoder_config("llama"))


@pytest.mark.parametrize(
    ("machine", "half", "found"),
    [
        (HOPPER, True, "flash_attention_3"),
        (Machine((9, 0), frozenset({"flash_attention_2"})), True, "flash_attention_2"),
        (AMPERE, True, "flash_attention_2"),
        (TURING, True, None),
        (Machine((9, 0)), True, None),
        (HOPPER, False, None),
        (Machine(), True, None),
    ],
)
def test_flash_attention_is_taken_where_package_gpu_and_precision_allow(llama, machine, half, found):
    assert fastest(llama, half, machine) == found


def test_a_model_without_flash_attention_keeps_what_transformers_chooses():
    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    model = BertForMaskedLM(BertConfig(vocab_size=9, **small))
    model._supports_flash_attn = model.bert._supports_flash_attn = False
    set_attention(model, None, True, HOPPER)
    assert attention_of(model) == "sdpa"


def test_without_a_gpu_nothing_changes_and_what_is_named_is_taken(llama):
    set_attention(llama, None, True, Machine())
    assert attention_of(llama) == "sdpa"
    set_attention(llama, "eager", True, this_machine())
    assert attention_of(llama) == "eager"
    set_attention(llama, "sdpa", True, this_machine())


@pytest.mark.parametrize(
    ("dtype", "keys", "fused"), [(torch.bfloat16, 256, False), (torch.bfloat16, 257, True), (torch.float32, 64, True)]
)
def test_on_a_cpu_short_attention_in_bf16_is_written_out(llama, dtype, keys, fused):
    set_attention(llama, "sdpa", True, Machine())
    module = llama.model.layers[0].self_attn
    query, key, value = (torch.randn(2, heads, keys, 8, dtype=dtype) for heads in (4, 2, 2))
    module.num_key_value_groups, mask = 2, torch.ones(2, 1, keys, keys, dtype=torch.bool).tril()
    with profile() as seen:
        found, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, mask)
    assert fused == any("flash_attention_for_cpu" in event.key for event in seen.key_averages())
    told = [x.double().repeat_interleave(4 // x.shape[1], 1) for x in (query, key, value)]
    scores = (told[0] @ told[1].mT * 8**-0.5).masked_fill(~mask, -torch.inf)
    torch.testing.assert_close(found.double(), (scores.softmax(-1) @ told[2]).transpose(1, 2), atol=0.02, rtol=0.02)


def test_flash_attention_that_is_not_installed_is_refused_and_never_fetched(llama):
    with pytest.raises(InputError, match=r"^attn_implementation: is flash_attention_2, which needs its package, a GPU"):
        set_attention(llama, "flash_attention_2", True, Machine((9, 0)))
