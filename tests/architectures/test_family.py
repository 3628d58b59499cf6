"""Records of families are found by model type, whatever module they are in; units they name can change places."""

from __future__ import annotations

import re

import pytest
import torch
from families import config, drawn
from transformers import AutoConfig, AutoModelForMaskedLM

from recyclable.architectures.family import Family, _records, family_of
from recyclable.architectures.structure import Structure

KNOWN = (
    *("bert", "ernie", "megatron-bert", "electra", "distilbert", "roberta", "xlm-roberta", "camembert"),
    *("xlm-roberta-xl", "roberta-prelayernorm", "data2vec-text"),
)
OF_LAYERS = (  # of which nothing but the way through a layer is told
    *("gpt2", "gpt_neox", "llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "smollm3", "phi3"),
    *("gemma", "gemma2", "gemma3_text", "granite", "olmo", "modernbert"),
)
SIZE = {"vocab_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
SIZE |= {"max_position_embeddings": 32, "pad_token_id": 0}


def made(kind: str):
    return config(kind) if kind in ("distilbert", "electra") else AutoConfig.for_model(kind, hidden_size=16, **SIZE)


def test_the_known_types_and_no_others() -> None:
    assert set(_records()) == {*KNOWN, *OF_LAYERS}
    assert {kind for kind in OF_LAYERS if _records()[kind].heads is None} == set(OF_LAYERS)
    assert family_of(config("opt")) == Family()


@pytest.mark.parametrize("kind", KNOWN)
@pytest.mark.parametrize("what", ["heads", "neurons"])
def test_interchangeable_units_change_places_without_changing_what_a_model_computes(kind: str, what: str) -> None:
    model = drawn(made(kind))
    ids = torch.tensor([[5, 6, 7, 8]])
    rows, columns = getattr(family_of(model.config), what)
    found = 0
    with torch.no_grad():
        before = model(input_ids=ids).last_hidden_state
        for name, parameter in model.named_parameters():
            if not (inside := re.match(r"^(.*?\.\d+)\.(.+)$", name)):
                continue
            for side, pattern in ((0, rows), (1, columns)):
                if re.fullmatch(pattern, inside[2]):
                    parameter.copy_(parameter.roll(parameter.shape[side] // 2, side))
                    found += 1
        assert found == 2 * (7 if what == "heads" else 3)
        assert torch.allclose(model(input_ids=ids).last_hidden_state, before, atol=1e-5)


@pytest.mark.parametrize("kind", [kind for kind in KNOWN if kind not in ("electra", "distilbert")])
def test_a_masked_head_in_its_parts_gives_the_model_s_own_logits(kind: str) -> None:
    model = drawn(made(kind), AutoModelForMaskedLM)
    transform, last = family_of(model.config).masked_head(model)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        told = model(input_ids=ids, output_hidden_states=True)
        states = model.base_model(input_ids=ids).last_hidden_state
        assert torch.equal(last(transform(states)), told.logits)
    assert last.weight.shape == (40, 16) and type(last) is torch.nn.Linear
    assert Structure(model.config).prefix == model.base_model_prefix
