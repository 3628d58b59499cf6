"""Which layer group a tensor belongs to: embeddings, layer 0 ... n-1, and what comes after, in model order."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from itertools import accumulate, takewhile

from torch import nn

EMBEDDINGS, OTHER = "embeddings", "other"


def layer_lists(model: nn.Module) -> dict[str, nn.ModuleList]:
    """The stacks of layers by name, in model order: lists of modules that are in no other list.

    Lists of embeddings alone are none.
    """
    found: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if isinstance(module, nn.ModuleList) and not inside and not all(isinstance(m, nn.Embedding) for m in module):
            found[name] = module
    return found


class LayerGroups:
    """The layer groups of a backbone, by its stacks of layers and its embeddings.

    Where there is one stack its layers are `layer i`, else the stacks' names tell them apart (`encoder layer i`).
    Lists of one length side by side are parts of the same layers.

    Args:
        prefix: of the backbone's names in a model with a head.
    """

    def __init__(self, backbone: nn.Module, prefix: str) -> None:
        lists = layer_lists(backbone)
        stacks = [(name.rpartition(".")[0], len(module)) for name, module in lists.items()]
        title_of = _titles(dict(zip(stacks[::-1], list(lists)[::-1], strict=True)))
        self._titles = {name: title_of[stack] for name, stack in zip(lists, stacks, strict=True)}
        self._order = list(dict.fromkeys(f"{title}layer" for title in self._titles.values()))
        self._embeddings = _embeddings(backbone, lists)
        self._outside = re.compile(rf"^(?:base_model\.(?:model\.)?)?(?:{re.escape(prefix)}\.)?")

    def of(self, name: str) -> str:
        """The group of a tensor: `embeddings`, `layer i`, or `other` (final norm, heads).

        Args:
            name: canonical, or as in a model with a head, or as in a PEFT adapter's file.
        """
        inside = self._outside.sub("", name)
        for stack, title in self._titles.items():
            if found := re.match(rf"{re.escape(stack)}\.(\d+)\.", inside):
                return f"{title}layer {int(found[1])}"
        return EMBEDDINGS if any(f"{inside}.".startswith(f"{module}.") for module in self._embeddings) else OTHER

    def split(self, names: Iterable[str]) -> dict[str, list[str]]:
        """Group -> its tensors, groups in model order; groups without any are left out."""
        groups: dict[str, list[str]] = {}
        for name in names:
            groups.setdefault(self.of(name), []).append(name)

        def place(group: str) -> tuple[int, int]:
            if group in (EMBEDDINGS, OTHER):
                return (-1 if group == EMBEDDINGS else len(self._order)), 0
            stack, _, number = group.rpartition(" ")
            return self._order.index(stack), int(number)

        return {group: groups[group] for group in sorted(groups, key=place)}


def _titles(stacks: Mapping[tuple[str, int], str]) -> dict[tuple[str, int], str]:
    """What tells stacks apart, each with a space behind it; nothing for one alone.

    Args:
        stacks: (the module that holds it, its length) -> its first list's name.
    """
    holders = [holder for holder, _ in stacks]
    paths = [name.split(".") for name in (holders if len(set(holders)) == len(stacks) else stacks.values())]
    for _ in range(2):  # what all begin with goes, then what all end with
        shared = len(list(takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))))
        paths = [path[shared:][::-1] for path in paths]
    titles = (".".join(path) for path in paths)
    return {stack: f"{title} " if title else "" for stack, title in zip(stacks, titles, strict=True)}


def _embeddings(backbone: nn.Module, lists: Mapping[str, nn.ModuleList]) -> list[str]:
    """The embeddings outside the layers, each with the largest module around it that holds no layers."""
    found: dict[str, None] = {}
    for name, module in backbone.named_modules(remove_duplicate=False):
        if isinstance(module, nn.Embedding) and not any(name.startswith(f"{stack}.") for stack in lists):
            around = accumulate(name.split("."), lambda outer, inner: f"{outer}.{inner}")
            found[next(m for m in around if not any(stack.startswith(f"{m}.") for stack in lists))] = None
    return list(found)
