"""Both layouts of a family's files, by transformers' own conversions: read as one, written as save_pretrained does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedModel
from transformers.core_model_loading import MergeModulelist

from recyclable.errors import InputError
from recyclable.weights.base import Base
from recyclable.weights.checkpoint_files import InMemory
from recyclable.weights.fingerprint import fingerprint
from recyclable.weights.layouts import as_saved

_SIZE: dict[str, Any] = {
    **{"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2},
    **{"num_key_value_heads": 1, "max_position_embeddings": 32, "pad_token_id": 0},
}
_EXPERTS = {**_SIZE, "num_experts_per_tok": 2}
_LINEAR = {
    **{"layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 2, "linear_num_key_heads": 1},
    **{"linear_key_head_dim": 8, "linear_value_head_dim": 8, "head_dim": 8},
}
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {**_EXPERTS, "num_local_experts": 12},  # as numbers they are sorted otherwise than as texts
    "phimoe": {**_EXPERTS, "num_local_experts": 4},
    "granitemoe": {**_EXPERTS, "num_local_experts": 4},
    "jamba": {
        **{**_EXPERTS, "num_experts": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2},
        **{"expert_layer_offset": 1, "use_mamba_kernels": False, "mamba_d_state": 4, "mamba_dt_rank": 4},
    },
    "ernie4_5_moe": {**_EXPERTS, "moe_num_experts": 4, "moe_intermediate_size": 12, "moe_k": 2},
    "qwen3_next": {
        **{**_EXPERTS, **_LINEAR, "num_experts": 4, "moe_intermediate_size": 12},
        "shared_expert_intermediate_size": 12,
    },
    "olmo_hybrid": {**_SIZE, **_LINEAR},
    "hrm_text": _SIZE,
    "gpt_neox": {name: value for name, value in _SIZE.items() if name != "num_key_value_heads"},
    "esm": {**_SIZE, "mask_token_id": 4, "position_embedding_type": "rotary"},
    "gte": _SIZE,
    "nomic_bert": _SIZE,
}
"""Experts merged, fused projections parted or parts fused, tensors transposed, modules renamed."""


def made(family: str, **changed: Any) -> PreTrainedModel:
    config = AutoConfig.for_model(family, **{**FAMILIES[family], **changed})
    auto = AutoModelForCausalLM if type(config) in AutoModelForCausalLM._model_mapping else AutoModelForMaskedLM
    torch.manual_seed(1)
    model = auto.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.1)
    return model


def own_tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """As today's model has them, tied ones once, under the embedding's name."""
    tensors, tied = model.state_dict(), set(model.all_tied_weights_keys)
    return {name: tensor.contiguous() for name, tensor in tensors.items() if name not in tied}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_the_same_base_in_both_layouts(family: str, tmp_path: Path) -> None:
    model = made(family)
    model.save_pretrained(tmp_path / "saved")
    model.config.save_pretrained(tmp_path / "own")
    save_file(own_tensors(model), tmp_path / "own" / "model.safetensors", metadata={"format": "pt"})
    saved, own = (load_file(tmp_path / name / "model.safetensors") for name in ("saved", "own"))
    assert saved.keys() != own.keys()
    bases = [Base(tmp_path / name) for name in ("saved", "own")]
    assert fingerprint(bases[0]) == fingerprint(bases[1])
    prefix = f"{bases[0].prefix}."
    for name, tensor in own.items():
        if (canonical := name.removeprefix(prefix)) in bases[0]:
            assert torch.equal(bases[0][canonical], tensor), name
    assert sum(name.removeprefix(prefix) in bases[0] for name in own) >= len(bases[0].names) > 10
    again = as_saved(model, InMemory(own))
    assert set(again.names) == saved.keys() and all(torch.equal(again[name], saved[name]) for name in saved)


def with_both(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.0.mlp.experts.down_proj"] = torch.zeros(4, 16, 24)


def without_one(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.layers.1.block_sparse_moe.experts.3.w2.weight"]


def without_a_part_of_one(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.layers.1.block_sparse_moe.experts.3.w3.weight"]


def of_two_precisions(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.0.block_sparse_moe.experts.2.w1.weight"] = torch.zeros(24, 16).bfloat16()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (
            with_both,
            r"holds model\.layers\.0\.mlp\.experts\.down_proj twice: as it is, and as .*experts\.0\.w2\.weight",
        ),
        (without_one, r"experts\.0\.w2\.weight and the like make .*down_proj \(3, 16, 24\), expected \(4, 16, 24\)"),
        (
            without_a_part_of_one,
            r"transformers makes .*1\.mlp\.experts\.gate_up_proj of .*experts\.0\.w1\.weight and 6 ",
        ),
        (
            of_two_precisions,
            r"gate_up_proj of .* by MergeModulelist, Concatenate, which cannot be \(.*bfloat16 and .*32",
        ),
    ],
)
def test_files_that_make_no_whole_tensor_are_refused(
    damage: Callable[[dict[str, torch.Tensor]], None], said: str, tmp_path: Path
) -> None:
    made("mixtral", num_local_experts=4).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    damage(tensors)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=said) as caught:
        Base(tmp_path)
    assert "\n" not in str(caught.value)


def test_an_operation_that_is_no_rearrangement_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made("mixtral", num_local_experts=4).save_pretrained(tmp_path)
    merge = MergeModulelist.convert
    monkeypatch.setattr(
        MergeModulelist, "convert", lambda *args, **more: {n: t + t for n, t in merge(*args, **more).items()}
    )
    with pytest.raises(
        InputError, match=r"by MergeModulelist, .*which cannot be \(aten.add.Tensor is no rearrangement"
    ):
        Base(tmp_path)
