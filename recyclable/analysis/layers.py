"""Which layer group a base's tensor belongs to: embeddings, layer 0 ... n-1, and what comes after, in model order."""

from __future__ import annotations

import re
from collections.abc import Iterable

EMBEDDINGS, OTHER = "embeddings", "other"
_LAYER = re.compile(r"(?:^|\.)(?:layers?|h|blocks?|albert_layer_groups)\.(\d+)\.")
_EMBEDDING = re.compile(r"(?:^|\.)(?:embeddings?|embed_\w+|rel_embeddings|wte|wpe)(?:\.|$)")


def layer_of(name: str) -> str:
    """The group of a tensor by its canonical name: `embeddings`, `layer i`, or `other` (final norm, LM head)."""
    if found := _LAYER.search(name):
        return f"layer {int(found[1])}"
    return EMBEDDINGS if _EMBEDDING.search(name) else OTHER


def by_layer(names: Iterable[str]) -> dict[str, list[str]]:
    """Group -> its tensors, groups in model order; groups without any are left out."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(layer_of(name), []).append(name)

    def place(group: str) -> tuple[int, int]:
        if group in (EMBEDDINGS, OTHER):
            return (0 if group == EMBEDDINGS else 2), 0
        return 1, int(group.removeprefix("layer "))

    return {group: groups[group] for group in sorted(groups, key=place)}
