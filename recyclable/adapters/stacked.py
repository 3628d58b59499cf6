"""Several LoRA adapters on one frozen base in one forward pass: each has rows of the batch of its own.

The base computes over all rows at once; only the low-rank products, and heads that are trained whole, are each
adapter's own. As in Punica (Chen et al. 2023, arXiv 2310.18547) and LoRAFusion (Zhu et al. 2025, arXiv 2510.00206).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn
from torch.nn import functional as F

from recyclable.errors import InputError

_NAME = "default"
"""What PEFT calls the one adapter of a model."""


class Segment(NamedTuple):
    """Rows [start, stop) of a batch, which are one adapter's."""

    adapter: int
    start: int
    stop: int


class Rows:
    """Whose the rows of the batch under way are; all places of a stack look here, in the backward pass as well."""

    def __init__(self) -> None:
        self.segments: list[Segment] = []
        """All of the batch, in order."""

    def scaled(self, rows: int) -> list[Segment]:
        """The segments of a tensor with several rows for each of the batch's, such as all its tokens."""
        times, left = divmod(rows, self.segments[-1].stop)
        assert not left, f"{rows} rows of a batch of {self.segments[-1].stop}"
        return [Segment(adapter, start * times, stop * times) for adapter, start, stop in self.segments]


def apart(tensor: torch.Tensor, segments: Sequence[Segment]) -> Sequence[torch.Tensor]:
    """Each segment's rows of a tensor [rows, ...]: at once, so that the backward pass joins their gradients at once."""
    return tensor.split([stop - start for _, start, stop in segments])


class LowRank(NamedTuple):
    """One adapter's part at a linear layer."""

    down: torch.Tensor
    """A [r, in]"""
    up: torch.Tensor
    """B [out, r]"""
    scale: float
    dropout: float
    """Of its input, in training."""


class StackedLinear(nn.Module):
    """A frozen linear layer with low-rank updates of several adapters: y = W x + scale B A x, by each row's own A, B.

    Its adapters are no submodules: what partitions or casts the base leaves them alone, in fp32 and whole.
    """

    def __init__(self, base: nn.Module, parts: Mapping[int, LowRank], rows: Rows) -> None:
        super().__init__()
        self.base_layer = base
        self._parts, self._rows = dict(parts), rows

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, ..., in] to [B, ..., out]"""
        result = self.base_layer(x)
        segments = self._rows.scaled(len(x))
        present = [segment for segment in segments if segment.adapter in self._parts]
        if not present:
            return result
        parts = [self._parts[segment.adapter] for segment in present]
        pieces = dict(zip(segments, apart(x, segments), strict=True))
        inputs = [
            F.dropout(pieces[segment], part.dropout, self.training)
            for segment, part in zip(present, parts, strict=True)
        ]
        if _alike(inputs, parts):
            updates = _in_one(inputs, parts)
        else:
            updates = [
                F.linear(F.linear(each, part.down.to(x.dtype)), part.up.to(x.dtype)) * part.scale
                for each, part in zip(inputs, parts, strict=True)
            ]
        if present == segments:
            return result + torch.cat(updates)
        update_of = dict(zip(present, updates, strict=True))
        results = apart(result, segments)
        both = [(piece, update_of.get(segment)) for segment, piece in zip(segments, results, strict=True)]
        return torch.cat([piece if update is None else piece + update for piece, update in both])


class StackedModule(nn.Module):
    """A module of which each adapter has a whole copy, such as a head; narrower outputs are filled up with 0.

    Of rows that are no adapter's it says 0, however wide.
    """

    def __init__(self, parts: Mapping[int, nn.Module], rows: Rows) -> None:
        super().__init__()
        self._parts, self._rows = dict(parts), rows

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, ...] to [B, ..., C], C the largest of all adapters'."""
        found = []
        segments = self._rows.scaled(len(x))
        pieces = apart(x, segments)
        for (adapter, _, _), own in zip(segments, pieces, strict=True):
            if adapter in self._parts:
                module = self._parts[adapter]
                found.append(module(own.to(next(module.parameters()).dtype)).to(x.dtype))
            else:
                found.append(0.0 * own.sum(-1, keepdim=True))
        widest = max(each.shape[-1] for each in found)
        return torch.cat([F.pad(each, (0, widest - each.shape[-1])) for each in found])


def stack(host: PeftModel, models: Sequence[PeftModel], rows: Rows) -> PeftModel:
    """The host, made to compute with the adapter of any of the models; adapters' parameters stay the models' own.

    Args:
        host: one more model like the first of them, which is used up: its own adapter is taken off.
        models: LoRA adapters on unread models of one base.

    Raises InputError for adapters that are more than low-rank updates of linear layers and modules trained whole.
    """
    layers: dict[str, dict[int, LowRank]] = {}
    copies: dict[str, dict[int, nn.Module]] = {}
    for number, model in enumerate(models):
        known: set[int] = set()
        for path, module in model.named_modules():
            if isinstance(module, LoraLayer):
                layers.setdefault(path, {})[number] = _low_rank(path, module)
            elif isinstance(module, ModulesToSaveWrapper):
                copies.setdefault(path, {})[number] = module.modules_to_save[_NAME]
            else:
                continue
            known |= {id(parameter) for parameter in module.parameters()}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and id(parameter) not in known:
                raise InputError("tuning", f"trains {name}, expected LoRA on linear layers and heads alone in a stack")
    for path, module in list(host.named_modules()):
        if isinstance(module, LoraLayer):
            _replace(host, path, module.get_base_layer())
        elif isinstance(module, ModulesToSaveWrapper):
            _replace(host, path, module.original_module)
    for path, parts in layers.items():
        _replace(host, path, StackedLinear(host.get_submodule(path), parts, rows))
    for path, wholes in copies.items():
        if len(wholes) < len(models):
            raise InputError("tuning", f"trains {path} in some runs of the stack, expected the same head in all")
        _replace(host, path, StackedModule(wholes, rows))
    return host.requires_grad_(False)


def _low_rank(path: str, layer: LoraLayer) -> LowRank:
    down, up = (dict(weights.items()).get(_NAME) for weights in (layer.lora_A, layer.lora_B))
    biased = getattr(up, "bias", None) is not None
    if biased or layer.lora_variant or not (isinstance(down, nn.Linear) and isinstance(up, nn.Linear)):
        kind = " with ".join([type(layer).__name__, *(type(each).__name__ for each in layer.lora_variant.values())])
        raise InputError("tuning", f"{path} has a LoRA {kind}, expected plain LoRA on linear layers in a stack")
    dropout = getattr(layer.lora_dropout[_NAME], "p", 0.0)
    return LowRank(down.weight, up.weight, layer.scaling[_NAME], float(dropout))


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def _alike(inputs: Sequence[torch.Tensor], parts: Sequence[LowRank]) -> bool:
    """Whether their products may be made together."""
    return len({each.shape for each in inputs}) == 1 and len({part.down.shape for part in parts}) == 1


def _in_one(inputs: Sequence[torch.Tensor], parts: Sequence[LowRank]) -> list[torch.Tensor]:
    """The updates of adapters of one rank with equally many rows each, by two batched products."""
    x = torch.stack([each.flatten(0, -2) for each in inputs])
    down = torch.stack([part.down.T for part in parts]).to(x.dtype)
    up = torch.stack([part.up.T * part.scale for part in parts]).to(x.dtype)
    return [update.unflatten(0, inputs[0].shape[:-1]) for update in x @ down @ up]
