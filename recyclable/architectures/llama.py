"""Llama and all decoders that took over its layers: a norm, attention, a norm, feed-forward."""

from __future__ import annotations

from recyclable.architectures.family import Family, WayThrough

_LAST = ("input_layernorm",), "self_attn.o_proj"
LLAMA = Family(
    (
        *("llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "smollm3"),
        *("gemma", "gemma2", "gemma3_text", "granite", "olmo"),
    ),
    way_through=WayThrough(*_LAST, "self_attn.q_proj"),
)
PHI3 = Family(("phi3",), way_through=WayThrough(*_LAST))
"""One projection makes queries, keys and values."""
