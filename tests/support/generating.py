"""Tiny random models that generate, plain or with an adapter, and what plain transformers or peft have them answer."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from decoders import decoder_config
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, GenerationConfig, PreTrainedModel

from recyclable.weights.generation_rules import rules_of

NEW = 9
"""Tokens of an answer at most."""
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14, 15, 16, 17], [3, 4], [20, 21, 22, 23, 24], [30, 31], [7, 7]]
CHANGED: dict[str, dict[str, Any]] = {
    "gemma3_text": {
        **{"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
        "tie_word_embeddings": False,  # tied, so small a Gemma says its last token again and again
    },
}
ADAPTERS = {
    "lora": lambda kind: LoraConfig(task_type=kind, target_modules="all-linear", init_lora_weights=False),
    "prompts": lambda kind: PromptTuningConfig(task_type=kind, num_virtual_tokens=3),
    "prefix": lambda kind: PrefixTuningConfig(task_type=kind, num_virtual_tokens=3),
}


def made(family: str, seed: int = 0) -> PreTrainedModel:
    """A model in evaluation whose answers depend on all of their prompts."""
    config = decoder_config(family, **CHANGED.get(family, {}))
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model = auto.from_config(config).eval()
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if parameter.dim() > 1:
                parameter.normal_(0, 0.6, generator=noise)
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    return model


def adapted(family: str, adapter: str) -> nn.Module:
    """The same with one of `ADAPTERS` on it, far from doing nothing."""
    base = made(family)
    kind = "SEQ_2_SEQ_LM" if base.config.is_encoder_decoder else "CAUSAL_LM"
    noise = torch.Generator().manual_seed(3)
    model = get_peft_model(base, ADAPTERS[adapter](kind)).eval()
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                parameter.normal_(0, 0.6, generator=noise)
    return model


def rules(model: Any, end: int | None = None) -> GenerationConfig:
    """The model's own, with a tokenizer that has this end token."""
    return rules_of(model.config, SimpleNamespace(eos_token_id=end))  # type: ignore[arg-type]


def plain(model: Any, prompt: list[int], **keys: Any) -> list[int]:
    """What transformers or peft answer to one prompt, without the end token."""
    begin = 1 if model.config.is_encoder_decoder else len(prompt)
    ids = torch.tensor([prompt])
    keys = {"max_new_tokens": NEW, "do_sample": False, **keys}
    (row,) = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **keys).tolist()
    end = model.generation_config.eos_token_id
    return row[begin : row.index(end, begin) if end in row[begin:] else None]
