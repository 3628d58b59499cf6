"""Attention by what a machine has: a pure function of it, so that every machine can be asked about here."""

from __future__ import annotations

import pytest
from decoders import decoder, decoder_config
from transformers import BertConfig, BertForMaskedLM, PreTrainedModel

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


def test_flash_attention_that_is_not_installed_is_refused_and_never_fetched(llama):
    with pytest.raises(InputError, match=r"^attn_implementation: is flash_attention_2, which needs its package, a GPU"):
        set_attention(llama, "flash_attention_2", True, Machine((9, 0)))
