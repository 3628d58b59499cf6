"""How strongly differences are added: what a strength multiplies, of deltas and of the adapters that have one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from threading import Lock

import torch
from peft.utils.other import get_pattern_key
from torch import nn
from transformers.pytorch_utils import Conv1D

from recyclable.carrying.carried import Carried
from recyclable.carrying.places import PEFT_PREFIX, adapter_base_name
from recyclable.errors import InputError
from recyclable.weights.checkpoint_files import Ranged
from recyclable.weights.differences import Changed, Differences, Scaled
from recyclable.weights.digest import PIECE
from recyclable.weights.manifest import ADAPTER_CONFIG
from recyclable.weights.strict_json import read_json

_FACTORS = ("lora_B", "lora_embedding_B", "bottleneck_up")
"""What an adapter's effect is proportional to, by parts of its tensors' names."""
_BESIDE = ("lora_A", "lora_E", "lora_embedding_A", "bottleneck_down")
"""What makes up the effect together with these."""
_MAGNITUDE = "lora_magnitude_vector"
_PAIRS = (("", ".weight"), ("embedding_", ""))
"""How A's and B's names differ between Linears and embeddings."""


class Strength:
    """What is added at any strength: new base + strength x difference.

    Args:
        differences: those of the weights, or made from them.
    """

    def __init__(self, carried: Carried, differences: Differences) -> None:
        self._carried, self.differences = carried, differences

    @cached_property
    def names(self) -> list[str]:
        """The tensors that have a strength; InputError for a kind of adapter that has none.

        Every tensor of an adapter must be a value of the base's own, or of a module whose effect some factor scales, or
        belong to the head, which stays.
        """
        if not self._carried.weights.is_adapter:
            return self.differences.names
        names = [name for name in self.differences.names if name in self._carried.full or _role(name) in _FACTORS]
        for name in self.differences.names:
            known = name in names or _role(name) in _BESIDE or name in self._doras or self._is_heads(name)
            if not known or not names:
                problem = f"is neither a LoRA nor a bottleneck adapter ({name}): it has no strength"
                raise InputError(self._carried.weights.folder, problem)
        return [*names, *(name for name in self._doras if name not in names)]

    @property
    def parts(self) -> list[str]:
        """All tensors that make up the effect, each as much as it is large; InputError where some are no such thing."""
        names = self.names
        if not self._carried.weights.is_adapter:
            return names
        if self._doras:
            problem = f"is a DoRA ({next(iter(self._doras))}): its magnitudes are no differences"
            raise InputError(self._carried.weights.folder, problem)
        return [name for name in self.differences.names if name in names or _role(name) in _BESIDE]

    def at(self, scales: Mapping[str, float]) -> Differences:
        """The differences, each tensor's at a strength of its own; tensors that are not named stay as they are."""
        if all(scale == 1 for scale in scales.values()):
            return self.differences
        doras = self._doras if self._carried.weights.is_adapter else {}
        scaled = Scaled(self.differences, {name: scale for name, scale in scales.items() if name not in doras})
        return ScaledDora(scaled, scales, doras) if doras else scaled

    def _is_heads(self, name: str) -> bool:
        """Whether a tensor of an adapter's file belongs to the task's head, a fresh pooler included."""
        new = self._carried.new
        first = adapter_base_name(name, new).partition(".")[0]
        inside = name.startswith("base_model.") and first not in dict(new.structure.backbone.named_children())
        return inside or first == "pooler"

    @cached_property
    def _doras(self) -> dict[str, Dora]:
        """What DoRA's arithmetic changes at a strength: magnitudes, and the factors beside them."""
        return dict(self._found_doras())

    def _found_doras(self) -> Iterator[tuple[str, Dora]]:
        new, config = self._carried.new, read_json(self._carried.weights.folder / ADAPTER_CONFIG)
        names, modules = self.differences.names, dict(new.structure.backbone.named_modules())
        for name in (name for name in names if _role(name) == _MAGNITUDE):
            module = name.partition(f".{_MAGNITUDE}")[0]
            plain = adapter_base_name(module, new)
            pairs = [(f"{module}.lora_{kind}A{end}", f"{module}.lora_{kind}B{end}") for kind, end in _PAIRS]
            pair = next((pair for pair in pairs if set(pair) <= set(names)), None)
            beside = {f"{module}.base_layer.weight", f"{module}.lora_B.bias"} & set(names)
            layer = modules.get(plain) if f"{plain}.weight" in new else None
            if pair is None or beside or not isinstance(layer, nn.Linear | nn.Embedding | Conv1D):
                problem = f"its DoRA is on {plain}, which is no plain Linear or embedding of the base: no strength"
                raise InputError(self._carried.weights.folder, problem)
            rank, inside = self.differences.shape(pair[1])[1], module.removeprefix(PEFT_PREFIX)
            alphas: dict[str, float] = config.get("alpha_pattern") or {}
            alpha = alphas.get(get_pattern_key(list(alphas), inside), config["lora_alpha"])
            factor = alpha / (rank**0.5 if config.get("use_rslora") else rank)
            transposed = not isinstance(layer, nn.Linear)
            dora = Dora(self.differences, new.hashed, f"{plain}.weight", (*pair, name), factor, transposed)
            yield from ((pair[1], dora), (name, dora))


def _role(name: str) -> str | None:
    """Which part of a LoRA or bottleneck adapter a tensor is."""
    return next((part for part in name.split(".") if part in (*_FACTORS, *_BESIDE, _MAGNITUDE)), None)


class Dora:
    """One module's DoRA (Liu et al. 2024, arXiv 2402.09353, equation 5): W' = m (W + f B A) / |W + f B A|, by output.

    At strength s the weights are W + s (W' - W), which is a DoRA too, with c = m / |W + f B A|: its d (W + f b B A),
    where d = 1 - s + s c scales each output and b = s c / d its row of B.

    Args:
        new: the new base's tensors.
        weight: the module's in the base.
        names: of A, B and m in PEFT's file.
        factor: f.
        transposed: outputs are the columns of the module's weight.
    """

    def __init__(
        self,
        differences: Differences,
        new: Ranged,
        weight: str,
        names: tuple[str, str, str],
        factor: float,
        transposed: bool,
    ) -> None:
        self._differences, self._new, self._weight = differences, new, weight
        self._names, self._factor, self._transposed = names, factor, transposed
        self._known: dict[float, tuple[torch.Tensor, torch.Tensor]] = {}
        self._finding = Lock()

    def at(self, strength: float) -> tuple[torch.Tensor, torch.Tensor]:
        """(what each row of B is multiplied by, m), both [outputs], fp32."""
        with self._finding:  # threads that read B and m wait for the one that is at it
            if strength not in self._known:
                a, b, m = (self._differences.read(name).view(self._differences.shape(name)) for name in self._names)
                share = m / self._norms(a, b)
                whole = 1 - strength + strength * share
                whole = torch.where(whole == 0, torch.finfo(torch.float32).eps, whole)
                rows = strength * share / whole
                self._known[strength] = rows, whole * self._norms(a, rows[:, None] * b)
            return self._known[strength]

    def _norms(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """|W + f B A| of each output, a few MiB of W at a time."""
        height, width = self._new.shape(self._weight)
        step, parts = max(1, PIECE // (4 * width)), []
        for first in range(0, height, step):
            last = min(first + step, height)
            piece = self._new.read(self._weight, first * width, last * width).view(-1, width).float()
            if b.any():
                added = a[:, first:last].T @ b.T if self._transposed else b[first:last] @ a
                piece += self._factor * added
            parts.append(piece.double().square().sum(0) if self._transposed else torch.linalg.norm(piece, dim=1))
        return torch.stack(parts).sum(0).sqrt().float() if self._transposed else torch.cat(parts)


class ScaledDora(Changed):
    """Differences of an adapter that are scaled but for DoRA's, which are here.

    Args:
        doras: what has another value at a strength -> the module it belongs to.
    """

    def __init__(self, inner: Differences, scales: Mapping[str, float], doras: Mapping[str, Dora]) -> None:
        super().__init__(inner)
        self.scales, self.doras = scales, doras

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """fp32."""
        scale = self.scales.get(name, 1.0)
        if name not in self.doras or scale == 1:
            return self.inner.read(name, start, stop)
        rows, magnitude = self.doras[name].at(scale)
        if _role(name) == _MAGNITUDE:
            return magnitude[start:stop]
        values = self.inner.read(name, start, stop)
        return values * rows[torch.arange(start, start + len(values)) // self.shape(name)[1]]
