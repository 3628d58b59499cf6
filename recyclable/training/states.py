"""What optimizers keep of each trainable parameter, by name and range: fp32 weights, moments, steps taken.

Whatever the ZeRO stage, offload or precision, an optimizer steps tensors of its own: a slot says which elements of
which parameter lie where in one of them. What is taken out at one stage on so many ranks goes in at any other.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

from recyclable import distributed
from recyclable.errors import InputError
from recyclable.training.pieces import MOMENTS, WEIGHT, Kept, Piece
from recyclable.training.swapped import at_hand
from recyclable.training.zero import full_shape, load_trainable, own_range
from recyclable.weights.sources import read_into

_SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


@dataclass(frozen=True)
class _Slot:
    """Where elements of a parameter lie in a tensor that an optimizer steps."""

    name: str
    start: int
    numel: int
    stepped: torch.Tensor
    offset: int = 0
    whole: bool = False
    """Whether every rank has the same."""

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The elements, in the stepped tensor or one like it; a view."""
        return tensor.detach().view(-1)[self.offset : self.offset + self.numel]


def trained_shapes(engine: deepspeed.DeepSpeedEngine) -> dict[str, list[int]]:
    """Name -> full shape of everything that is trained."""
    return {name: list(full_shape(p)) for name, p in engine.module.named_parameters() if p.requires_grad}


def require_known(engine: deepspeed.DeepSpeedEngine) -> None:
    """InputError for an optimizer whose states this file does not find."""
    if getattr(engine.optimizer, "zenflow", None):
        problem = "checkpoints do not hold ZenFlow's states: remove it from the ds_config, or set save_every to 0"
        raise InputError("zero_optimization.zenflow", problem)


def copies(engine: deepspeed.DeepSpeedEngine) -> list[Piece]:
    """What this rank keeps, copied to host memory; all ranks together have every element once.

    Raises InputError for an optimizer whose states this file does not find.
    """
    require_known(engine)
    pieces = [_copied(slot, optimizer.state) for optimizer, slots in _slots(engine, write=False) for slot in slots]
    return [piece for piece in pieces if piece.tensors[WEIGHT].numel()]  # a rank may have none of a small parameter


def _copied(slot: _Slot, states: Mapping[torch.Tensor, dict[str, Any]]) -> Piece:
    first, last = 0, slot.numel
    if slot.whole:
        rank, world = distributed.rank(), distributed.world_size()
        first, last = slot.numel * rank // world, slot.numel * (rank + 1) // world
    state = states.get(slot.stepped, {})
    kept = {WEIGHT: slot.stepped, **{kind: state[kind] for kind in MOMENTS if kind in state}}
    tensors = {kind: slot.of(tensor)[first:last].to("cpu", copy=True) for kind, tensor in kept.items()}
    return Piece(slot.name, slot.start + first, tensors, float(state.get("step", 0)))


def restore(engine: deepspeed.DeepSpeedEngine, kept: Kept) -> None:
    """Have an engine go on with these weights, moments and steps; each rank reads its own ranges."""
    weights = kept.kind(WEIGHT)
    for optimizer, slots in _slots(engine, write=True):
        targets = [(slot.of(slot.stepped), partial(weights.read, slot.name), slot.start) for slot in slots]
        slots_of: dict[torch.Tensor, list[_Slot]] = {}  # by identity, as tensors compare as keys
        for slot in slots:
            slots_of.setdefault(slot.stepped, []).append(slot)
        for tensor, own in slots_of.items():
            steps = max(kept.steps(slot.name) for slot in own)
            if steps or tensor in optimizer.state:
                state = _fresh_state(optimizer, tensor, steps)
                for kind in MOMENTS:
                    pieces = kept.kind(kind)
                    read = ((slot.of(state[kind]), slot) for slot in own if slot.name in pieces)
                    targets += [(flat, partial(pieces.read, slot.name), slot.start) for flat, slot in read]
        read_into(targets)
    load_trainable(engine.module, weights)  # what the model computes with: the optimizer's values, rounded
    if isinstance(engine.optimizer, DeepSpeedZeroOptimizer_Stage3):
        engine.optimizer.invalidate_secondary_tensor()


def _fresh_state(optimizer: torch.optim.Optimizer, stepped: torch.Tensor, steps: float) -> dict[str, Any]:
    """AdamW's state of a tensor, as it makes it itself at its first step, but for the number of steps."""
    flat = stepped.detach()
    step = torch.tensor(steps, dtype=torch.float32, device=flat.device if optimizer.defaults["fused"] else "cpu")
    optimizer.state[stepped] = {"step": step, **{kind: torch.zeros_like(flat) for kind in MOMENTS}}
    return optimizer.state[stepped]


def scaling(engine: deepspeed.DeepSpeedEngine) -> dict[str, float]:
    """What a changing loss scale (fp16) has come to; nothing where there is none."""
    scaler = _scaler(engine)
    return {name: getattr(scaler, name) for name in _SCALER if hasattr(scaler, name)} if scaler else {}


def set_progress(engine: deepspeed.DeepSpeedEngine, step: int, scaled: Mapping[str, float]) -> None:
    """Have an engine count on from a step, and scale losses on from what they had come to there."""
    engine.global_steps, engine.global_samples = step, step * engine.train_batch_size()
    set_scaling(engine, scaled)


def set_scaling(engine: deepspeed.DeepSpeedEngine, scaled: Mapping[str, float]) -> None:
    """Have an engine scale losses on from what `scaling` has told; nothing where its scale does not change."""
    scaler = _scaler(engine)
    for name, value in scaled.items() if scaler else ():
        if name in _SCALER and hasattr(scaler, name):
            setattr(scaler, name, value)


def _scaler(engine: deepspeed.DeepSpeedEngine) -> Any:
    for name, changes in (("loss_scaler", "dynamic"), ("loss_scale_config", "dynamic_loss_scale")):
        scaler = getattr(engine.optimizer, name, None)
        if getattr(scaler, changes, False):
            return scaler
    return None


def _slots(engine: deepspeed.DeepSpeedEngine, write: bool) -> Iterator[tuple[torch.optim.Optimizer, list[_Slot]]]:
    """(optimizer that steps them, slots of this rank), a group at a time: those on NVMe are in memory until the next.

    Args:
        write: the group's new values are to be kept.
    """
    wrapper = engine.optimizer
    trained = [(name, p) for name, p in engine.module.named_parameters() if p.requires_grad]
    if isinstance(wrapper, DeepSpeedZeroOptimizer_Stage3):
        yield from _of_stage_3(wrapper, {id(p): name for name, p in trained}, write)
    elif isinstance(wrapper, torch.optim.Optimizer):
        yield wrapper, [_Slot(name, 0, p.numel(), p, whole=True) for name, p in trained]
    elif isinstance(wrapper, FP16_UnfusedOptimizer):
        groups = zip(wrapper.fp16_groups, wrapper.fp32_groups, strict=True)
        master = {id(p): copy for half, full in groups for p, copy in zip(half, full, strict=True)}
        yield wrapper.optimizer, [_Slot(name, 0, p.numel(), master[id(p)], whole=True) for name, p in trained]
    else:
        yield wrapper.optimizer, list(_of_flat_groups(wrapper.optimizer, trained))


def _of_flat_groups(optimizer: torch.optim.Optimizer, trained: Iterable[tuple[str, Any]]) -> Iterator[_Slot]:
    """ZeRO-1 and 2: each of the optimizer's groups is one tensor, this rank's part of all parameters in a row."""
    for name, parameter in trained:
        mapping = parameter._hp_mapping
        if mapping is not None:  # else it lies in other ranks' parts
            (stepped,) = optimizer.param_groups[mapping.param_group_index]["params"]
            here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
            yield _Slot(name, here.start, here.numel, stepped, there.start)


def _of_stage_3(
    wrapper: DeepSpeedZeroOptimizer_Stage3, names: Mapping[int, str], write: bool
) -> Iterator[tuple[torch.optim.Optimizer, list[_Slot]]]:
    """Groups of parameters, each one tensor of this rank's partitions in a row."""
    for i, group in enumerate(wrapper.fp16_groups):
        on_device = wrapper.offload_optimizer and wrapper.subgroup_to_device[i] != "cpu"  # ZeRO-Offload's ratio
        with at_hand(wrapper, i, changed=write) as stepped:
            slots = []
            for parameter in group:
                _, offset, _ = wrapper.grad_position[wrapper.get_param_id(parameter)]
                start, stop = own_range(parameter)
                slots.append(_Slot(names[id(parameter)], start, stop - start, stepped, offset))
            yield wrapper.backup_optimizer if on_device else wrapper.optimizer, slots
