"""Decoders, encoders and encoder-decoders of many families, tiny and random, with tokenizers and a corpus for them.

Windows are shorter than the texts. The language is that of `worlds`: words `w0` ..., a word is a token.
"""

from __future__ import annotations

import random
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
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from worlds import WORDS

SPECIALS = ["<pad>", "<unk>", "<s>", "</s>"]
SENTINELS = [f"<extra_id_{i}>" for i in range(12)]
TOKENS = len(SPECIALS) + len(SENTINELS) + len(WORDS)
_SPECIAL_IDS = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
_SIZE: dict[str, Any] = {
    **{"vocab_size": TOKENS, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2},
    **{"intermediate_size": 32, "max_position_embeddings": 64, "initializer_range": 0.15, **_SPECIAL_IDS},
}
_GROUPED = {**_SIZE, "num_key_value_heads": 1, "head_dim": 8}
_T5 = {
    **{
        "vocab_size": TOKENS,
        "d_model": 24,
        "num_layers": 2,
        "num_heads": 2,
        "d_ff": 32,
        "d_kv": 8,
        "dropout_rate": 0.0,
    },
    **{"pad_token_id": 0, "eos_token_id": 3, "decoder_start_token_id": 0, "initializer_factor": 1.0},
}
_BART = {
    **{"vocab_size": TOKENS, "d_model": 24, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32},
    **{"decoder_ffn_dim": 32, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "init_std": 0.15},
    **{"max_position_embeddings": 64, "decoder_start_token_id": 3, "forced_eos_token_id": 3, **_SPECIAL_IDS},
}
CAUSAL, MASKED, SPANS = AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM
FAMILIES: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "llama": (CAUSAL, "llama", _GROUPED),
    "llama untied": (CAUSAL, "llama", {**_GROUPED, "tie_word_embeddings": False}),
    "mistral": (CAUSAL, "mistral", {**_GROUPED, "sliding_window": 4}),
    "qwen2": (CAUSAL, "qwen2", _GROUPED),
    "qwen3": (CAUSAL, "qwen3", {**_GROUPED, "tie_word_embeddings": True}),
    "gemma2": (
        CAUSAL,
        "gemma2",
        {**_GROUPED, "sliding_window": 4, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8},
    ),
    "gemma3": (
        CAUSAL,
        "gemma3_text",
        {**_GROUPED, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "gpt2": (
        CAUSAL,
        "gpt2",
        {
            **{"vocab_size": TOKENS, "n_embd": 24, "n_layer": 2, "n_head": 2, "n_inner": 32, "n_positions": 64},
            **{"initializer_range": 0.15, **_SPECIAL_IDS},
        },
    ),
    "opt": (CAUSAL, "opt", {**_SIZE, "ffn_dim": 32, "word_embed_proj_dim": 24, "init_std": 0.15}),
    "gpt_neox": (CAUSAL, "gpt_neox", {**_SIZE, "tie_word_embeddings": False}),
    "bloom": (
        CAUSAL,
        "bloom",
        {"vocab_size": TOKENS, "hidden_size": 24, "n_layer": 2, "n_head": 2, "initializer_range": 0.15, **_SPECIAL_IDS},
    ),
    "bert": (MASKED, "bert", _SIZE),
    "roberta": (MASKED, "roberta", {**_SIZE, "pad_token_id": 1, "type_vocab_size": 1}),
    "modernbert": (
        MASKED,
        "modernbert",
        {**_SIZE, "local_attention": 8, "global_attn_every_n_layers": 2, "cls_token_id": 2, "sep_token_id": 3},
    ),
    "deberta": (
        MASKED,
        "deberta-v2",
        {**_SIZE, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 4},
    ),
    "t5": (SPANS, "t5", _T5),
    "t5 unscaled": (SPANS, "t5", {**_T5, "tie_word_embeddings": False, "initializer_factor": 0.2}),
    "bart": (SPANS, "bart", _BART),
}


def tiny(family: str, attention: str | None = None, seed: int = 0) -> PreTrainedModel:
    """The family's language model, every parameter random; ValueError where it cannot attend so."""
    auto, name, sizes = FAMILIES[family]
    model = auto.from_config(AutoConfig.for_model(name, **sizes), attn_implementation=attention)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            parameter += 0.15 * torch.randn(parameter.shape, generator=draw)
    return model.eval()


def tokenizer_of(auto: Any) -> PreTrainedTokenizerFast:
    """A word-level tokenizer: a decoder's begins a text with <s>, an encoder-decoder's ends it with </s>."""
    backend = Tokenizer(WordLevel({w: i for i, w in enumerate([*SPECIALS, *SENTINELS, *WORDS])}, unk_token="<unk>"))
    backend.pre_tokenizer = Whitespace()
    single = "<s> $A" if auto is CAUSAL else "$A </s>"
    backend.post_processor = TemplateProcessing(single=single, special_tokens=[("<s>", 2), ("</s>", 3)])
    named = {"bos_token": "<s>"} if auto is CAUSAL else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **{"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "</s>", **named},
        additional_special_tokens=SENTINELS,
        model_input_names=["input_ids", "attention_mask"],
    )


def save_tiny(family: str, folder: Path, seed: int = 0) -> Path:
    """A base of the family with its tokenizer."""
    tiny(family, seed=seed).save_pretrained(folder)
    tokenizer = tokenizer_of(FAMILIES[family][0])
    if family == "qwen2":  # transformers has every Qwen2 split texts into bytes, of which this vocabulary has none
        tokenizer.add_tokens(WORDS)
    tokenizer.save_pretrained(folder)
    return folder


def short_texts(file: Path, documents: int = 400, first: int = 0, seed: int = 5) -> Path:
    """A text file, a document of 1 to 14 words per line, of 24 words from the `first` on; each tells of the next."""
    draw, lines = random.Random(seed), []
    for _ in range(documents):
        word, line = draw.randrange(24), []
        for _ in range(draw.randint(1, 14)):
            line.append(WORDS[first + word])
            word = (3 * word + draw.randint(1, 2)) % 24
        lines.append(" ".join(line))
    file.write_text("\n".join(lines) + "\n")
    return file
