"""Encoders of every family that transformers has a classifier for, tiny, as bases and as tuned elsewhere."""

from __future__ import annotations

from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from worlds import make_tokenizer

TOKENS = 100
_SHAPE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
_SPECIAL = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
_SIZE: dict[str, Any] = {
    **{"vocab_size": TOKENS, "max_position_embeddings": 64, "initializer_range": 0.3},
    **_SHAPE,
    **_SPECIAL,
}
_NARROW = {**_SIZE, "embedding_size": 8}
_SEQ2SEQ: dict[str, Any] = {
    **{"vocab_size": TOKENS, "d_model": 16, "max_position_embeddings": 64, "init_std": 0.3},
    **{f"{part}_layers": 1 for part in ("encoder", "decoder")},
    **{f"{part}_attention_heads": 2 for part in ("encoder", "decoder")},
    **{f"{part}_ffn_dim": 24 for part in ("encoder", "decoder")},
    **_SPECIAL,
    **{"decoder_start_token_id": 2, "forced_eos_token_id": 3},
}
_T5: dict[str, Any] = {
    **{"vocab_size": TOKENS, "d_model": 16, "num_layers": 1, "num_heads": 2, "d_ff": 24, "d_kv": 8},
    **{"pad_token_id": 0, "eos_token_id": 3, "decoder_start_token_id": 0, "initializer_factor": 2.0},
}
_XLM: dict[str, Any] = {
    **{"vocab_size": TOKENS, "emb_dim": 16, "n_layers": 2, "n_heads": 2, "max_position_embeddings": 64, "n_langs": 1},
    **{"embed_init_std": 0.3, "init_std": 0.3, "pad_index": 0, "bos_index": 2, "eos_index": 3, "unk_index": 1},
    **{"mask_index": 4, **_SPECIAL},
}
SIZES: dict[str, dict[str, Any]] = {
    "albert": _NARROW,
    "bert": _SIZE,
    "big_bird": {**_SIZE, "attention_type": "original_full"},
    "camembert": _SIZE,
    "canine": {
        **{name: value for name, value in _SIZE.items() if name != "vocab_size"},
        **{"downsampling_rate": 2, "local_transformer_stride": 8, "num_hash_buckets": 64},
    },
    "convbert": {**_NARROW, "head_ratio": 2, "conv_kernel_size": 3},
    "data2vec-text": _SIZE,
    "deberta": {**_SIZE, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False},
    "deberta-v2": {**_SIZE, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 4},
    "distilbert": {
        **{"vocab_size": TOKENS, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24, "pad_token_id": 0},
        **{"max_position_embeddings": 64, "initializer_range": 0.3},
    },
    "electra": _NARROW,
    "ernie": _SIZE,
    "esm": {**_SIZE, "mask_token_id": 4, "position_embedding_type": "rotary"},
    "eurobert": {**_SIZE, "mask_token_id": 4},
    "flaubert": _XLM,
    "fnet": _SIZE,
    "funnel": {
        **{"vocab_size": TOKENS, "block_sizes": [1, 1], "num_decoder_layers": 1, "d_model": 16, "n_head": 2},
        **{"d_head": 8, "d_inner": 24, "initializer_std": 0.3, "pad_token_id": 0},
    },
    "ibert": _SIZE,
    "layoutlm": _SIZE,
    "longformer": {**_SIZE, "attention_window": 8, "max_position_embeddings": 66, "sep_token_id": 3},
    "luke": {**_SIZE, "entity_vocab_size": 10, "entity_emb_size": 8},
    "megatron-bert": _SIZE,
    "mobilebert": {
        **{**_SIZE, "embedding_size": 16, "intra_bottleneck_size": 16, "true_hidden_size": 16},
        **{"num_feedforward_networks": 2},
    },
    "modernbert": {**_SIZE, "cls_token_id": 2, "sep_token_id": 3, "local_attention": 8},
    "mpnet": _SIZE,
    "mra": {**_SIZE, "block_per_row": 2},
    "nystromformer": {**_SIZE, "num_landmarks": 8, "segment_means_seq_len": 8},
    "rembert": {**_SIZE, "input_embedding_size": 8, "output_embedding_size": 8},
    "roberta": _SIZE,
    "roberta-prelayernorm": _SIZE,
    "roformer": {**_SIZE, "embedding_size": 16},
    "squeezebert": {
        **{**_SIZE, "embedding_size": 16, "post_attention_groups": 1},
        **{f"{part}_groups": 2 for part in ("q", "k", "v", "intermediate", "output")},
    },
    "xlm": _XLM,
    "xlm-roberta": _SIZE,
    "xlm-roberta-xl": _SIZE,
    "xlnet": {
        **{"vocab_size": TOKENS, "d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 24, "initializer_range": 0.3},
        **_SPECIAL,
    },
    "xmod": {**_SIZE, "languages": ["en_XX"], "default_language": "en_XX"},
    "yoso": {**_SIZE, "use_expectation": True},
    "bart": _SEQ2SEQ,
    "mbart": _SEQ2SEQ,
    "t5": _T5,
    "umt5": _T5,
    "gte": _SIZE,
    "nomic_bert": _SIZE,
    "perceiver": {
        **{"vocab_size": TOKENS, "num_latents": 8, "d_latents": 16, "d_model": 16, "num_blocks": 1},
        **{"num_self_attends_per_block": 2, "num_self_attention_heads": 2, "num_cross_attention_heads": 2},
        **{"qk_channels": 16, "v_channels": 16, "max_position_embeddings": 64, "initializer_range": 0.3},
    },
}
REFUSED = {
    "perceiver": "the base lacks decoder.decoder.",  # of the classifier's own, under the backbone's name
}
"""Families whose tuned weights are refused, and how the line begins that says so."""
UNTIED = ("bert", "distilbert", "modernbert", "eurobert", "t5")
"""Some that are built with a language-model head of its own weights as well."""


def encoder_config(family: str, **changed: Any) -> PretrainedConfig:
    """A tiny config of the family."""
    return AutoConfig.for_model(family, **{**SIZES[family], **changed})


def encoder(config: PretrainedConfig, seed: int) -> PreTrainedModel:
    """A base with its language-model head where the family has one, all its parameters random."""
    kinds = (AutoModelForSeq2SeqLM,) if config.is_encoder_decoder else (AutoModelForMaskedLM, AutoModelForCausalLM)
    auto = next((kind for kind in kinds if type(config) in kind._model_mapping), AutoModel)
    torch.manual_seed(seed)
    return moved(auto.from_config(config), seed)


def moved(model: PreTrainedModel, seed: int, scale: float = 0.1) -> PreTrainedModel:
    """The model in evaluation, every parameter that is trained moved by noise."""
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                parameter += scale * torch.randn(parameter.shape, generator=noise)
    return model.eval()


def encoder_tokenizer(config: PretrainedConfig) -> PreTrainedTokenizerFast:
    """A tokenizer of words for it, with token types where the classifier tells several apart."""
    classifier = AutoModelForSequenceClassification._model_mapping[type(config)]
    reads = signature(classifier.forward).parameters
    types = "token_type_ids" in reads and getattr(config, "type_vocab_size", 2) > 1
    tokenizer = make_tokenizer([f"w{i}" for i in range(TOKENS - 5)])
    names = ["input_ids", *(["token_type_ids"] if types else []), "attention_mask"]
    tokenizer.model_input_names = tokenizer.init_kwargs["model_input_names"] = names
    return tokenizer


def linear_names(model: PreTrainedModel) -> list[str]:
    """The last parts of the names of the linear layers in the backbone's layers."""
    inside = [n for n, module in model.base_model.named_modules() if type(module) is nn.Linear]
    return sorted({n.rpartition(".")[2] for n in inside if any(part.isdigit() for part in n.split("."))})


def head_names(model: PreTrainedModel) -> list[str]:
    """The modules that are the task's alone, a pooler among them."""
    beside = [name for name, child in model.named_children() if child is not model.base_model]
    pooler = getattr(model.base_model, "pooler", None)
    kept = [name for name in beside if any(True for _ in model.get_submodule(name).parameters())]
    return [*kept, *(["pooler"] if pooler is not None and any(True for _ in pooler.parameters()) else [])]


def save(model: PreTrainedModel, folder: Path) -> Path:
    """With its tokenizer."""
    model.save_pretrained(folder)
    encoder_tokenizer(model.config).save_pretrained(folder)
    return folder
