"""What a LoRA adds to the base's own tensors, as differences that can be read by range."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch

from recyclable.weights.algebra import flat_range
from recyclable.weights.checkpoint_files import Ranged

_A, _B = ".lora_A.weight", ".lora_B.weight"


class LoraDifference:
    """factor x B A of each pair of LoRA's matrices (Hu et al. 2021, arXiv 2106.09685, equation 3).

    Args:
        adapter: the adapter's file, by PEFT's names.
        base_name_of: PEFT name -> the canonical name it would have in the base.
        config: PEFT's, of kind LORA; see `is_plain`.
    """

    def __init__(self, adapter: Ranged, base_name_of: Mapping[str, str], config: Mapping[str, Any]) -> None:
        self.adapter, self._transposed = adapter, bool(config.get("fan_in_fan_out"))
        rank = config["r"] ** 0.5 if config.get("use_rslora") else config["r"]
        self.factor = config["lora_alpha"] / rank
        pairs = [name.removesuffix(_A) for name in adapter.names if name.endswith(_A)]
        self._pair = {base_name_of[p + _A].removesuffix(_A) + ".weight": p for p in pairs}
        self._factors = lru_cache(maxsize=8)(self._matrices)

    @staticmethod
    def is_plain(adapter: Ranged, config: Mapping[str, Any]) -> bool:
        """Whether the formula is all of it: no DoRA, no ranks of their own for some modules, no embeddings."""
        exotic = any(config.get(name) for name in ("use_dora", "rank_pattern", "alpha_pattern"))
        matrices = [name for name in adapter.names if ".lora_" in name]
        plain = all(name.endswith((_A, _B)) and len(adapter.shape(name)) == 2 for name in matrices)
        return config.get("peft_type") == "LORA" and not exotic and plain

    @property
    def names(self) -> list[str]:
        """The base's tensors that it changes."""
        return sorted(self._pair)

    def shape(self, name: str) -> tuple[int, ...]:
        """As the base has it."""
        rows, columns = self.adapter.shape(self._pair[name] + _B)[0], self.adapter.shape(self._pair[name] + _A)[1]
        return (columns, rows) if self._transposed else (rows, columns)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Elements [start, stop) of the flattened difference, fp32."""
        height, columns = self.shape(name)
        left, right = self._factors(name)

        def rows(first: int, last: int) -> torch.Tensor:
            return self.factor * (left[first:last] @ right)

        return flat_range(rows, columns, start, height * columns if stop is None else stop)

    def _matrices(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """(left [m, r], right [r, n]), fp32."""
        a, b = self.adapter[self._pair[name] + _A].float(), self.adapter[self._pair[name] + _B].float()
        return (a.T, b.T) if self._transposed else (b, a)
