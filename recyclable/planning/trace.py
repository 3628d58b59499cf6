"""Runs an objective forward and backward without memory, and follows what it would have held meanwhile.

Nothing is estimated: the very module that a run trains computes on tensors that have shapes and no values (torch's
FakeTensor), and every storage is counted from the operation that makes it until nobody refers to it any more.
"""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.utils.stateless import _reparametrize_module
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count
from transformers import PreTrainedModel
from transformers.integrations import moe

from recyclable.architectures import recomputing, short_attention
from recyclable.data.examples import Batch
from recyclable.kernels import chunked, tiling
from recyclable.objectives.objective import Objective
from recyclable.objectives.teachers import Teacher
from recyclable.objectives.vocabulary_loss import VocabularyLoss
from recyclable.planning import unseen

LOGITS, TEACHER, REST, HOST = range(4)
"""Whose a storage is: made inside the loss over a vocabulary, inside a teacher, or anywhere else; or in host memory."""
DEVICE = [LOGITS, TEACHER, REST]


class Untraceable(Exception):
    """A model did something that tensors without values cannot do: looked at one, or called a kernel of its own."""


Product = tuple[str, tuple[tuple[int, ...], ...]]
"""An operation and the shapes of its tensors."""


class Use(NamedTuple):
    """A module begins to compute."""

    moment: int
    parameters: tuple[str, ...]
    """With these, by the objective's names."""


@dataclass(frozen=True)
class Trace:
    """What was held at each moment of one micro-batch, the model's weights and finished gradients apart.

    T moments: every operation, and every time a parameter's gradient is complete.
    """

    held: np.ndarray
    """Bytes [T, 4], of `LOGITS`, `TEACHER`, `REST` and `HOST`."""
    done: np.ndarray
    """Bytes [T] of the gradients that are complete by then, as if none were ever given up."""
    forward: int
    """How many of the moments belong to the forward pass."""
    order: tuple[tuple[str, int], ...]
    """(parameter, moment at which its gradient is complete)."""
    uses: tuple[Use, ...]
    """Of parameters by modules, forward and backward, in their order."""
    flops: int
    """Of matrix products and attention in all passes over the batch, a multiplication and an addition as two."""
    half_products: frozenset[Product]
    """Matrix products in half precision, those of the same shapes once."""

    @property
    def saved(self) -> int:
        """Bytes that the forward pass leaves for the backward pass."""
        return int(self.held[self.forward - 1].sum())

    def peak(self, kept: float = 1.0) -> int:
        """The most bytes at once, where that share of each finished gradient stays."""
        return int((self.held.sum(1) + kept * self.done).max())


@dataclass
class _Follow(TorchDispatchMode):
    """Counts storages from the operation that makes them until they are freed, and FLOP."""

    owner: int = REST
    backward: bool = False
    flops: int = 0
    finished: int = 0
    held: list[int] = field(default_factory=lambda: [0] * 4)
    moments: list[tuple[int, ...]] = field(default_factory=list)
    half_products: set[Product] = field(default_factory=set)
    _known: dict[int, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, packet = kwargs or {}, func._overloadpacket
        args, places = unseen.without_masks(packet, args)
        for index in places:
            self.follow(index)
        found = unseen.answer(packet, args)
        if found is None:
            found = func(*args, **kwargs)
        if packet in _FLOPS:
            self.flops += _FLOPS[packet](*args, **kwargs, out_val=found)
        if packet in _PRODUCTS and args[0].dtype.itemsize == 2:
            shapes = tuple(tuple(tensor.shape) for tensor in args if isinstance(tensor, torch.Tensor))
            self.half_products.add((str(packet), shapes))
        for tensor in tree_iter(found):
            if isinstance(tensor, torch.Tensor):
                self.follow(tensor)
        # Autograd adds gradients up in place, but not those of tensors without values: both addends go at once.
        if not (self.backward and func is _ATEN.add.Tensor):
            self.note()
        return found

    def follow(self, tensor: torch.Tensor, counted: bool = True) -> None:
        """Count a tensor's storage, once, as the present owner's; or know it and never count it."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size, owner = storage.nbytes() if counted else 0, self.owner

        def freed(_: Any) -> None:
            del self._known[key]
            self.held[owner] -= size

        self._known[key] = weakref.ref(storage, freed)
        self.held[owner] += size

    def note(self) -> None:
        """A moment."""
        now = (*self.held, self.finished)
        if not self.moments or self.moments[-1] != now:
            self.moments.append(now)


_ATEN = torch.ops.aten
_PRODUCTS = {_ATEN.mm, _ATEN.addmm, _ATEN.addmm_, _ATEN.bmm, _ATEN.baddbmm}
_FLOPS = {
    **flop_registry,
    _ATEN.addmm_: flop_registry[_ATEN.addmm],
    # as torch counts them on other devices; it forgets the CPU's
    _ATEN._scaled_dot_product_flash_attention_for_cpu: lambda query, key, value, *_, **__: sdpa_flop_count(
        query.shape, key.shape, value.shape
    ),
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: lambda grad, query, key, value, *_, **__: (
        sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape)
    ),
    # experts': rows by groups, of which each has a matrix; forward, and backward with respect to rows and matrices
    torch.ops.transformers.grouped_mm_fallback: lambda rows, other, *_, **__: 2 * rows.numel() * other.shape[-1],
    torch.ops.transformers.grouped_mm_fallback_backward: lambda rows, other, *_, **__: (
        4 * rows.numel() * other.shape[-1]
    ),
}


def trace(
    objective: Objective,
    batch: Batch,
    *,
    precision: torch.dtype = torch.float32,
    autocast: torch.dtype | None = None,
    on_cpu: bool = True,
    training: bool = True,
) -> Trace:
    """Follow one micro-batch through an objective; neither is changed, and no memory is taken.

    Args:
        objective: its parameters may be on the meta device.
        batch: of the shapes that a run has. Whether it has padding is looked at, since models skip masks without.
        precision: of the weights.
        autocast: what products are computed in, where that is not the weights' precision.
        on_cpu: else kernels of a GPU are stood in for by the CPU's, which keep the same for the backward pass.
        training: else one evaluation: no gradients, no dropout.

    Raises `Untraceable`.
    """
    passes = objective.passes(0) if training else [{}]
    mask = batch.get("attention_mask")
    unpadded = mask is not None and not mask.is_meta and bool(mask.all())
    modes = {module: module.training for module in objective.modules()}
    follow = _Follow()
    order: list[tuple[str, int]] = []
    uses: list[Use] = []
    tracing = FakeTensorMode(allow_non_fake_inputs=True)
    with _no_collector(), tracing, _hooks(objective, follow, uses), _kernels(on_cpu, follow):
        own = _without_memory(objective, precision)
        told = {name: torch.empty_like(tensor, device="cpu") for name, tensor in batch.items()}
        for tensor in (*own.values(), *told.values()):
            follow.follow(tensor, counted=False)
        for tensor, name in {tensor: name for name, tensor in reversed(own.items())}.items() if training else ():
            if tensor.requires_grad:
                tensor.register_post_accumulate_grad_hook(_taking(name, follow, order))
        cast = nullcontext() if autocast is None else torch.autocast("cpu", autocast)
        try:
            objective.train(training)
            with (
                _reparametrize_module(objective, own, tie_weights=True),
                _masks_dropped(objective) if unpadded else nullcontext(),
                torch.set_grad_enabled(training),
                follow,
            ):
                # Passes after the first are alike; what the first leaves to them (a teacher's answers) stays.
                for of_pass in passes if len(passes) < 2 else (passes[0], passes[-1]):
                    before, follow.flops, follow.finished = follow.flops, 0, 0
                    order.clear()
                    uses.clear()
                    with cast:
                        sums = objective(told, **of_pass)
                        loss = sum(objective.weights[term] * value for term, value in sums.items())
                    del sums
                    forward = len(follow.moments)
                    follow.backward = training
                    if training:
                        loss.backward()
                    follow.backward = False
                    del loss
        except Exception as error:  # any family's own code runs here, and none of ours but the objectives'
            raise Untraceable(f"{type(error).__name__}: {str(error).partition(chr(10))[0][:100]}") from error
        finally:
            for module, mode in modes.items():
                module.training = mode
    moments = np.array(follow.moments, dtype=np.int64).reshape(-1, 5)
    flops = before + follow.flops * max(1, len(passes) - 1)
    products = frozenset(follow.half_products)
    return Trace(moments[:, :4], moments[:, 4], forward, tuple(order), tuple(uses), flops, products)


@contextmanager
def _no_collector() -> Iterator[None]:
    """While it lasts, what refers to itself stays: else it would hang on everything before when that is freed."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


def _without_memory(objective: Objective, precision: torch.dtype) -> dict[str, torch.Tensor]:
    """Parameters and buffers by name, tied ones the same tensor, in the precision that an engine would give them."""
    made: dict[torch.Tensor, torch.Tensor] = {}
    for tensor in (*objective.parameters(), *objective.buffers()):
        dtype = precision if tensor.is_floating_point() else tensor.dtype
        empty = torch.empty(getattr(tensor, "ds_shape", tensor.shape), dtype=dtype, device="cpu")  # of ZeRO-3's whole
        is_parameter = isinstance(tensor, nn.Parameter)
        made[tensor] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
    named = (*objective.named_parameters(remove_duplicate=False), *objective.named_buffers(remove_duplicate=False))
    return {name: made[tensor] for name, tensor in named}


def _taking(name: str, follow: _Follow, order: list[tuple[str, int]]) -> Any:
    """What notes a complete gradient, and takes it away."""

    def take(parameter: torch.Tensor) -> None:
        if parameter.grad is None:  # of what the loss does not depend on
            return
        follow.finished += parameter.grad.nbytes
        parameter.grad = None
        follow.note()
        order.append((name, len(follow.moments) - 1))

    return take


@contextmanager
def _hooks(objective: Objective, follow: _Follow, uses: list[Use]) -> Iterator[None]:
    """While it lasts, modules say when they compute, and whose is what is made inside."""
    borrowed: dict[nn.Module, list[nn.Parameter]] = {}
    for module, parameter in objective.borrowed():
        borrowed.setdefault(module, []).append(parameter)
    names = {parameter: name for name, parameter in objective.named_parameters()}
    handles: list[Any] = []
    with ExitStack() as stack:
        for module in objective.modules():
            own = [names[p] for p in (*module._parameters.values(), *borrowed.get(module, ())) if p is not None]
            if own:
                handles += _uses(module, tuple(own), follow, uses)
            if isinstance(module, VocabularyLoss):
                stack.enter_context(_owned(module, "forward", LOGITS, follow))
            elif isinstance(module, Teacher):
                stack.enter_context(_owned(module, "signals", TEACHER, follow))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _uses(module: nn.Module, own: tuple[str, ...], follow: _Follow, uses: list[Use]) -> list[Any]:
    """Hooks that note when a module computes with parameters, forward and backward."""

    def note(*_: Any) -> None:
        uses.append(Use(len(follow.moments), own))

    def computed(_: nn.Module, __: Any, found: Any) -> None:
        for tensor in tree_iter(found):
            if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
                tensor.register_hook(note)
                return

    return [module.register_forward_pre_hook(note), module.register_forward_hook(computed)]


@contextmanager
def _owned(module: nn.Module, method: str, owner: int, follow: _Follow) -> Iterator[None]:
    """While it lasts, what is made inside a method of a module is the owner's."""
    original, own = getattr(module, method), method in vars(module)

    def owning(*args: Any, **kwargs: Any) -> Any:
        before, follow.owner = follow.owner, owner
        try:
            return original(*args, **kwargs)
        finally:
            follow.owner = before

    setattr(module, method, owning)
    try:
        yield
    finally:
        if own:
            setattr(module, method, original)
        else:
            delattr(module, method)


@contextmanager
def _masks_dropped(objective: Objective) -> Iterator[None]:
    """While it lasts, models are not told masks that hide nothing: they would look, and there are no values here."""

    def without(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        mask = kwargs.get("attention_mask")
        of_padding = isinstance(mask, torch.Tensor) and mask.dim() == 2  # one that keeps documents apart has more
        return args, {**kwargs, "attention_mask": None} if of_padding else kwargs

    models = [module for module in objective.modules() if isinstance(module, PreTrainedModel)]
    handles = [model.register_forward_pre_hook(without, with_kwargs=True) for model in models]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _kernels(on_cpu: bool, follow: _Follow) -> Iterator[None]:
    """While it lasts, losses over a vocabulary take chunks of the size that they would take there, of which few are
    looked at, attention is of the kind there, and what layers save in host memory is the host's, where that is not the
    device's."""

    def moved(tensor: torch.Tensor) -> torch.Tensor:
        before, follow.owner = follow.owner, HOST
        try:
            return tensor.clone()
        finally:
            follow.owner = before

    def saved(**_: Any) -> saved_tensors_hooks:
        return saved_tensors_hooks(moved, torch.clone)

    size = chunked.chunk_tokens
    with ExitStack() as stack:
        # what fails is told by `Untraceable`, in a line
        stack.enter_context(patch.object(logging.getLogger("torch._subclasses.fake_tensor"), "disabled", True))
        chosen = lambda tokens, vocabulary, _: size(tokens, vocabulary, not on_cpu)  # noqa: E731
        stack.enter_context(patch.object(chunked, "chunk_tokens", chosen))
        stack.enter_context(patch.object(tiling, "tiles", _few(follow)))
        # torch's own product of groups has no shapes but in bf16
        stack.enter_context(patch.object(moe, "_can_use_grouped_mm", lambda *_: False))
        if not on_cpu:
            stack.enter_context(patch.object(recomputing, "save_on_cpu", saved))
            stack.enter_context(patch.object(short_attention, "is_short", lambda *_: False))
        yield


def _few(follow: _Follow) -> Callable[[int, int], Iterator[slice]]:
    """Tiles without those that do again what the second did, what the first left still there; their FLOP count."""
    tiles = tiling.tiles

    def few(length: int, size: int) -> Iterator[slice]:
        all_of_them = list(tiles(length, size))
        for number, tile in enumerate(all_of_them):
            if number < 2 or number == len(all_of_them) - 1:
                before = follow.flops
                yield tile
                if number == 1:
                    follow.flops += max(0, len(all_of_them) - 3) * (follow.flops - before)

    return few
