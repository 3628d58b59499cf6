"""A student that is, for one pass, a point on the straight path from fixed weights to its own, mixed layer by layer.

x: place on the path, 0 at the fixed end, 1 at the student's own weights.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from recyclable.architectures.recomputing import is_recomputed
from recyclable.errors import InputError


class WeightPath:
    """Makes the modules of a student compute with (1 - x) fixed + x own, each inside its own forward.

    Names, parameters and saved tensors of the student stay what they were: a mixed weight lives as long as the forward
    of its module, and is mixed again when its gradient is computed, so that ZeRO-3 never holds more than a layer.

    Args:
        student: the trainable end, changed in place (the modules' `forward`).
        fixed: models of the student's structure, the fixed ends of one path each.
        left_out: modules of the student that keep their own weights all along.
        users: modules that compute with the weights of one of the student's in its stead (a fused loss with those of a
            last layer) -> that module; they too are mixed inside the user's forward.

    Raises InputError where a module that is trained has no forward.
    """

    def __init__(
        self,
        student: nn.Module,
        fixed: Sequence[nn.Module],
        left_out: Collection[nn.Module] = (),
        users: Mapping[nn.Module, nn.Module] = MappingProxyType({}),
    ) -> None:
        self._x, self._end = 1.0, 0
        self._twins: dict[nn.Module, list[nn.Module]] = {}
        self._mixed: set[nn.Module] = set()
        apart = {inner for module in left_out for inner in module.modules()}
        for name, module in student.named_modules():
            if module not in apart and (own := _own(module)):
                if type(module).forward is nn.Module.forward and any(p.requires_grad for p in own.values()):
                    raise InputError("interpolate", _no_forward(name, module))
                self._twins[module] = [model.get_submodule(name) for model in fixed]
                module.forward = self._mixing(module, module.forward)
        self._names = {module: name for name, module in student.named_modules()}
        self._users = {user: module for user, module in users.items() if module in self._twins}
        for user, module in self._users.items():
            user.forward = self._mixing(module, user.forward)

    def go_to(self, x: float, end: int = 0) -> None:
        """From now on the student is at `x` of the path from fixed model number `end`."""
        self._x, self._end = x, end
        self._mixed.clear()

    def require_all_mixed(self) -> None:
        """After a forward pass at x < 1: InputError if a trained weight was used outside of its module's forward."""
        # the same weight may be several modules', of which not all are called (T5's `shared`)
        mixed = {parameter for module in self._mixed for parameter in _own(module).values()}
        for module in self._twins.keys() - self._mixed:
            if any(parameter.requires_grad and parameter not in mixed for parameter in _own(module).values()):
                raise InputError("interpolate", _no_forward(self._names[module], module))

    def borrowed(self) -> Iterator[tuple[nn.Module, nn.Parameter]]:
        """(module, parameter of a fixed model that its forward uses)."""
        users = {module: module for module in self._twins} | self._users
        for user, module in users.items():
            for twin in self._twins[module]:
                yield from ((user, parameter) for parameter in _own(twin).values())

    def _mixing(self, module: nn.Module, forward: Any) -> Any:
        def mixed_forward(*args: Any, **kwargs: Any) -> Any:
            x, twin = self._x, self._twins[module][self._end]
            if x == 1:
                return forward(*args, **kwargs)
            self._mixed.add(module)

            def mix(name: str) -> torch.Tensor:
                return torch.lerp(getattr(twin, name), getattr(module, name), x)

            mixed = {name: mix(name) for name in _own(module)}
            name_at = {tensor.untyped_storage()._cdata: name for name, tensor in mixed.items()}

            def pack(tensor: torch.Tensor) -> Any:
                """For the backward pass, where a mixed weight comes from in place of its values."""
                name = name_at.get(tensor.untyped_storage()._cdata)
                return tensor if name is None else (name, tensor.size(), tensor.stride(), tensor.storage_offset())

            def unpack(packed: Any) -> torch.Tensor:
                if isinstance(packed, torch.Tensor):
                    return packed
                name, *view = packed
                return mix(name).as_strided(*view)

            # a layer that computes again mixes again by itself
            hooks = nullcontext() if is_recomputed() else torch.autograd.graph.saved_tensors_hooks(pack, unpack)
            vars(module).update(mixed)  # found before the parameters of the same names
            try:
                with hooks:
                    return forward(*args, **kwargs)
            finally:
                for name in mixed:
                    del vars(module)[name]

        return mixed_forward


def _no_forward(name: str, module: nn.Module) -> str:
    return f"{name} cannot be interpolated: {type(module).__name__} does not use its weights in a forward of its own"


def _own(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that belong to a module itself."""
    return dict(module.named_parameters(recurse=False))
