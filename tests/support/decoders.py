"""Tiny decoders and encoder-decoders with tokenizers as theirs are: without a pad token, padding on the left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from worlds import WORDS

SPECIALS = ["<unk>", "<s>", "</s>", "<pad>"]
UNKNOWN, BEGIN, END, PAD = range(4)
_SIZE: dict[str, Any] = {
    **{"vocab_size": 208, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2},
    **{"intermediate_size": 24, "max_position_embeddings": 64, "initializer_range": 0.3},
    **{"bos_token_id": BEGIN, "eos_token_id": END, "pad_token_id": None},
}
_GROUPED = {**_SIZE, "num_key_value_heads": 1, "head_dim": 8}
_SEQ2SEQ: dict[str, Any] = {
    **{"vocab_size": _SIZE["vocab_size"], "d_model": 16, "pad_token_id": PAD, "eos_token_id": END},
}
SIZES: dict[str, dict[str, Any]] = {
    "gpt2": {
        **{"vocab_size": _SIZE["vocab_size"], "n_embd": 16, "n_layer": 2, "n_head": 2, "n_inner": 24},
        **{"n_positions": 64, "bos_token_id": BEGIN, "eos_token_id": END, "initializer_range": 0.3},
    },
    "opt": {**_SIZE, "ffn_dim": 24, "word_embed_proj_dim": 16, "init_std": 0.3},
    "gpt_neox": {**_SIZE, "rotary_pct": 0.5},
    "llama": _GROUPED,
    "mistral": {**_GROUPED, "sliding_window": 8},
    "qwen2": _GROUPED,
    "qwen3": _GROUPED,
    "gemma2": {**_GROUPED, "sliding_window": 8, "query_pre_attn_scalar": 8},
    "gemma3_text": {**_GROUPED, "sliding_window": 8, "query_pre_attn_scalar": 8},
    "t5": {
        **{**_SEQ2SEQ, "num_layers": 2, "num_heads": 2, "d_ff": 24, "d_kv": 8, "decoder_start_token_id": PAD},
        **{"initializer_factor": 2.0},
    },
    "bart": {
        **{**_SEQ2SEQ, "max_position_embeddings": 64, "init_std": 0.3, "decoder_start_token_id": END},
        **{f"{part}_{name}": 2 for part in ("encoder", "decoder") for name in ("layers", "attention_heads")},
        **{f"{part}_ffn_dim": 24 for part in ("encoder", "decoder")},
    },
    "phi3": _SIZE,
    "mixtral": {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {
        **{**_GROUPED, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12},
        "shared_expert_intermediate_size": 12,
    },
    "qwen3_moe": {**_GROUPED, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12},
}
"""Family -> what its config has; decoders without a pad token."""
SEQ2SEQ = ("t5", "bart")


def decoder_config(family: str, **changed: Any) -> PretrainedConfig:
    """A tiny config of the family."""
    return AutoConfig.for_model(family, **{**SIZES[family], **changed})


def decoder(config: PretrainedConfig, seed: int = 1, auto: type[Any] | None = None) -> PreTrainedModel:
    """With its language-model head, or as another AutoModelFor...; every parameter random, norms about 1."""
    auto = auto or (AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = auto.from_config(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn(parameter.shape)
    return model


def decoder_tokenizer(family: str, *, side: str = "left", ends: bool | None = None, **tokens: Any) -> Any:
    """A tokenizer of words; T5's and BART's have a pad token and put an end token, the others' do neither.

    Args:
        ends: whether it puts the end token behind every text.
    """
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate([*SPECIALS, *WORDS])}, unk_token="<unk>"))
    backend.pre_tokenizer = Whitespace()
    if family in SEQ2SEQ if ends is None else ends:
        backend.post_processor = TemplateProcessing(
            single="$A </s>",
            pair="$A </s> $B </s>" if family == "bart" else "$A $B </s>",
            special_tokens=[("</s>", END)],
        )
    given = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "padding_side": side, **tokens}
    if family in SEQ2SEQ:
        given.setdefault("pad_token", "<pad>")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **given)
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    return tokenizer


def make_decoder(folder: Path, family: str, seed: int = 1, tokenizer: Any = None, **changed: Any) -> Path:
    """A base in Hugging Face format; returns `folder`."""
    decoder(decoder_config(family, **changed), seed).save_pretrained(folder)
    (tokenizer or decoder_tokenizer(family)).save_pretrained(folder)
    return folder
