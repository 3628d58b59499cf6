"""Architectures of known sizes, 125M to 70B: what their config.json says, and the length that they were trained at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Known:
    """One of them."""

    name: str
    config: dict[str, Any]
    length: int
    """Tokens of a text."""


def _roberta(name: str, layers: int, width: int) -> Known:
    config = {"model_type": "roberta", "architectures": ["RobertaForMaskedLM"], "vocab_size": 50265, "pad_token_id": 1}
    config |= {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": width // 64}
    config |= {"intermediate_size": 4 * width, "max_position_embeddings": 514, "type_vocab_size": 1}
    return Known(name, config, 512)


def _gpt2(name: str, layers: int, width: int) -> Known:
    config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": 50257, "n_positions": 1024}
    return Known(name, config | {"n_embd": width, "n_layer": layers, "n_head": width // 64}, 1024)


def _llama(name: str, layers: int, width: int, wide: int, heads: int, pairs: int, length: int) -> Known:
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 32000}
    config |= {"hidden_size": width, "num_hidden_layers": layers, "intermediate_size": wide}
    config |= {"num_attention_heads": heads, "num_key_value_heads": pairs, "max_position_embeddings": length}
    return Known(name, config, length)


KNOWN = {
    "125M": _roberta("RoBERTa base", 12, 768),
    "355M": _roberta("RoBERTa large", 24, 1024),
    "774M": _gpt2("GPT-2 large", 36, 1280),
    "1.1B": _llama("TinyLlama", 22, 2048, 5632, 32, 4, 2048),
    "7B": _llama("Llama 2", 32, 4096, 11008, 32, 32, 4096),
    "13B": _llama("Llama 2", 40, 5120, 13824, 40, 40, 4096),
    "34B": _llama("Code Llama", 48, 8192, 22016, 64, 8, 4096),
    "70B": _llama("Llama 2", 80, 8192, 28672, 64, 8, 4096),
}
"""Size -> Liu et al. 2019 (arXiv 1907.11692); Radford et al. 2019; Zhang et al. 2024 (arXiv 2401.02385); Touvron et al.
2023 (arXiv 2307.09288); Rozière et al. 2023 (arXiv 2308.12950)."""
