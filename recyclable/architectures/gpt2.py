"""GPT-2 and GPT-NeoX."""

from __future__ import annotations

from recyclable.architectures.family import Family, WayThrough

GPT2 = Family(("gpt2",), way_through=WayThrough(("ln_1",), "attn.c_proj"))
NEOX = Family(("gpt_neox",), way_through=WayThrough(("input_layernorm",), "attention.dense"))
