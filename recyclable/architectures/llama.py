"""Llama and all decoders that took over its layers: a norm, attention, a norm, feed-forward."""

from __future__ import annotations

from recyclable.architectures.family import Family, WayThrough

LLAMA = Family(
    (
        *("llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "smollm3", "phi3"),
        *("gemma", "gemma2", "gemma3_text", "granite", "olmo"),
    ),
    way_through=WayThrough(("input_layernorm",), "self_attn.o_proj"),
)
