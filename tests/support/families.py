"""Tiny configs of many families, as transformers names them, for tests of what is derived from a structure."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel

VOCABULARY, LAYERS, WIDTH = 40, 2, 16
_SIZE = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,
}
_GROUPED = {**_SIZE, "num_key_value_heads": 1, "head_dim": 6}
_SIZES: dict[str, dict[str, Any]] = {
    "bert": _SIZE,
    "roberta": _SIZE,
    "distilbert": {"vocab_size": 40, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24}
    | {"max_position_embeddings": 32, "initializer_range": 0.3},
    "electra": {**_SIZE, "embedding_size": 8},
    "deberta-v2": {**_SIZE, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 4},
    "albert": {**_SIZE, "embedding_size": 8},
    "modernbert": {**_SIZE, "cls_token_id": 1, "sep_token_id": 2, "local_attention": 4},
    "gpt2": {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_inner": 24, "n_positions": 32}
    | {"bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.3},
    "opt": {**_SIZE, "ffn_dim": 24, "word_embed_proj_dim": 8, "init_std": 0.3},
    "gpt_neox": {**_SIZE, "rotary_pct": 0.5},
    "llama": _GROUPED,
    "qwen3": _GROUPED,
    "gemma2": {**_GROUPED, "sliding_window": 4},
    "cohere": _GROUPED,
    "granite": _GROUPED,
    "t5": {"vocab_size": 40, "d_model": 16, "num_layers": 2, "num_heads": 2, "d_ff": 24, "d_kv": 6}
    | {"decoder_start_token_id": 0, "eos_token_id": 2, "initializer_factor": 2.0},
}
FAMILIES = tuple(_SIZES)


def config(family: str, **changed: Any) -> PretrainedConfig:
    """A tiny config of the family, with some fields changed."""
    return AutoConfig.for_model(family, **{**_SIZES[family], **changed})


def drawn(made: PretrainedConfig, auto_class: type = AutoModel, seed: int = 0) -> PreTrainedModel:
    """A model in evaluation whose parameters are all random: biases and norms too."""
    model = auto_class.from_config(made).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            parameter.normal_(0.0, 0.3, generator=generator)
    return model
