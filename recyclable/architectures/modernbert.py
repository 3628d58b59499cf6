"""ModernBERT."""

from __future__ import annotations

from recyclable.architectures.family import Family, WayThrough

MODERNBERT = Family(("modernbert",), way_through=WayThrough(("attn_norm",), "attn.Wo"))
