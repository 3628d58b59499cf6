"""config.json of models of the sizes that ds_configs/ are for: shapes of RoBERTa and Llama, as small dicts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def _roberta(hidden: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        **{"model_type": "roberta", "architectures": ["RobertaForMaskedLM"], "hidden_size": hidden},
        **{"intermediate_size": 4 * hidden, "num_hidden_layers": layers, "num_attention_heads": heads},
        **{"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1, "pad_token_id": 1},
    }


def _llama(hidden: int, inner: int, layers: int, heads: int, key_value_heads: int, vocabulary: int) -> dict[str, Any]:
    return {
        **{"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": hidden},
        **{"intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads},
        **{"num_key_value_heads": key_value_heads, "head_dim": 128 if hidden >= 3072 else hidden // heads},
        **{"vocab_size": vocabulary, "max_position_embeddings": 4096, "tie_word_embeddings": vocabulary > 100_000},
    }


SHAPES = {
    "125m": _roberta(768, 12, 12),
    "350m": _roberta(1024, 24, 16),
    "1b": _llama(2048, 8192, 16, 32, 8, 128256),
    "3b": _llama(3072, 8192, 28, 24, 8, 128256),
    "7b": _llama(4096, 11008, 32, 32, 32, 32000),
    "13b": _llama(5120, 13824, 40, 40, 40, 32000),
    "34b": _llama(8192, 22016, 48, 64, 8, 32000),
    "70b": _llama(8192, 28672, 80, 64, 8, 32000),
}
"""RoBERTa-base and -large; Llama-3.2-1B and -3B; Llama-2-7B, -13B, CodeLlama-34B, Llama-2-70B."""


def write_shape(name: str, folder: Path) -> Path:
    """A directory with nothing but that config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(SHAPES[name]))
    return folder
