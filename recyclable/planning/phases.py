"""What one rank holds in each phase of a run, at that phase's worst moment: start, training, step, evaluation."""

from __future__ import annotations

from collections import Counter

import numpy as np

from recyclable.planning.gathering import gathered
from recyclable.planning.states import FP32, Held, Sizes, Zero, in_partition, share, steady
from recyclable.planning.trace import DEVICE, HOST, LOGITS, REST, TEACHER, Trace

_ALLREDUCE = 500_000_000
"""Elements of gradients that plain data parallelism adds up at once (DeepSpeed's `MEMORY_OPT_ALLREDUCE_SIZE`)."""
_NORM = 8
"""Bytes of an element while norms are found, tensor by tensor."""

_CPU_PROCESS = 55_000_000
"""What a process grows by beside tensors: modules imported late, threads, small blocks. Fitted, docs/planning.md."""
_KEPT = 0.35
"""Of what comes and goes, the most that glibc was seen to keep beside it (26 to 30% in a decoder's training)."""
_GPU_RUNTIME = 800_000_000
"""CUDA's context and NCCL's buffers: nominal, not measured here."""
_GPU_FRAGMENTS = 0.05
"""What torch's caching allocator keeps beside what is in use: nominal, not measured here."""


def phases(
    sizes: Sizes, zero: Zero, training: Trace, evaluation: Trace | None, gives_back: bool = True
) -> dict[str, Held]:
    """Phase -> bytes at its worst moment.

    Args:
        gives_back: whether a CPU's allocator gives back what is freed, as `memory` has it.
    """
    found = {"start": _start(sizes, zero), "training": _training(sizes, zero, training), "step": _step(sizes, zero)}
    if evaluation is not None:
        found["evaluation"] = _evaluation(sizes, zero, evaluation)
    return {name: held + Held(_process(held, zero, gives_back)) for name, held in found.items()}


def _start(sizes: Sizes, zero: Zero) -> Held:
    """Weights are flattened by the optimizer's groups beside what they were before, then copied to fp32."""
    held = steady(sizes, zero)
    held.device["optimizer"] = held.host["optimizer"] = held.host["gradients"] = 0
    largest = max((sum(group.values()) for group in sizes.groups()), default=0)
    if zero.stage in (1, 2):
        held.device["buckets"] = zero.size * largest
    elif zero.stage == 3:
        held.device["buckets"] = zero.size * share(sizes.trained, zero.ranks)
    held.device["gradients"] = 0
    return held


def _training(sizes: Sizes, zero: Zero, trace: Trace) -> Held:
    """Forward and backward: activations come and go, gradients come, ZeRO-3's weights are gathered."""
    held = np.vstack([trace.held, trace.held[-1:]])  # one moment more, for what follows the last gradient
    gradients, buckets = _gradients(sizes, zero, trace)
    weights = gathered(sizes, zero, trace)
    moment = int((held[:, DEVICE].sum(1) + gradients + buckets + weights.sum(1)).argmax())
    now = Counter(
        weights=int(weights[moment, 0]),
        teacher=int(weights[moment, 1] + held[moment, TEACHER]),
        gradients=int(gradients[moment]),
        buckets=int(buckets[moment]),
        logits=int(held[moment, LOGITS]),
        activations=int(held[moment, REST]),
    )
    saved = Counter(activations=int(held[:, HOST].max()))
    return steady(sizes, zero) + Held(now, saved)


def _gradients(sizes: Sizes, zero: Zero, trace: Trace) -> tuple[np.ndarray, np.ndarray]:
    """Bytes of gradients and of buckets at each moment; what `steady` has is left out."""
    moments = len(trace.held) + 1
    gradients, buckets = np.zeros(moments, dtype=np.int64), np.zeros(moments, dtype=np.int64)
    size = zero.size
    if zero.stage == 0:
        gradients[:-1], gradients[-1] = trace.done, trace.done[-1]
        if zero.accumulating:
            gradients[:] = trace.done[-1]
        if zero.ranks > 1 or size < FP32:
            buckets[-1] += min(size * _ALLREDUCE, int(trace.done[-1]))
        return gradients, buckets
    owned = in_partition(sizes, zero.ranks) if zero.stage < 3 else frozenset()
    waiting, touched, kept, large = 0, 0, 0, 0
    if not zero.on_cpu and zero.stage < 3:
        buckets[:] = size * zero.reduce_bucket * zero.buckets
    pending: list[str] = []

    def reduce(moment: int) -> None:
        nonlocal waiting, kept, large
        copied = waiting + large
        if zero.ranks > 1 or zero.stage == 3:
            # ZeRO-3 puts them side by side by rank; gloo, which has no reduce-scatter, copies that once more
            buckets[moment] += size * copied * (2 if zero.stage == 3 and zero.on_cpu else 1)
        if zero.stage < 3 and zero.optimizer_on == "none":
            kept += sum(sizes.trained[name] for name in pending if name in owned)
            gradients[moment:] = size * kept
        pending.clear()
        waiting = large = 0

    order = trace.order
    last = moments - 1
    for name, moment in order:
        n, moment = sizes.trained[name], moment + 1
        if zero.stage == 1:
            moment = last
        if waiting + large + n > zero.reduce_bucket and waiting + large > 0:
            reduce(moment)
        pending.append(name)
        if n > zero.reduce_bucket:
            large = n
        else:
            waiting += n
        if zero.on_cpu:
            touched = max(touched, waiting)
            buckets[moment:] = size * touched
        gradients[moment:] = size * (kept + large)
    if zero.stage == 1:
        gradients[:-1] += trace.done
    reduce(last)
    if zero.stage < 3 and zero.accumulating and zero.optimizer_on == "none":
        gradients += size * sum(sizes.trained[name] for name in owned)
    return gradients, buckets


def _step(sizes: Sizes, zero: Zero) -> Held:
    """Gradients are flattened by group, brought to fp32, their norm found in fp64."""
    held = steady(sizes, zero)
    largest = max((sum(group.values()) for group in sizes.groups()), default=0)
    most = max(sizes.trained.values(), default=0)
    norm = _NORM * (most if zero.stage < 3 else -(-most // zero.ranks))
    if zero.stage == 0:
        held.device["gradients"] = zero.size * sum(sizes.trained.values())
        if zero.size < FP32:
            held.device["gradients"] += FP32 * sum(sizes.trained.values())
        return held
    if zero.optimizer_on != "none":
        return held
    flat = -(-largest // zero.ranks) if zero.stage < 3 else min(share(sizes.trained, zero.ranks), zero.sub_group)
    if zero.stage < 3:
        held.device["gradients"] += zero.size * sum(sizes.trained[name] for name in in_partition(sizes, zero.ranks))
    made = zero.size * flat + (FP32 * flat if zero.size < FP32 else 0)
    held.device["gradients"] += max(made, norm)
    return held


def _evaluation(sizes: Sizes, zero: Zero, trace: Trace) -> Held:
    """A forward pass that keeps nothing."""
    weights = gathered(sizes, zero, trace)[:-1]
    moment = int((trace.held[:, DEVICE].sum(1) + weights.sum(1)).argmax())
    now = Counter(
        weights=int(weights[moment, 0]),
        teacher=int(weights[moment, 1] + trace.held[moment, TEACHER]),
        logits=int(trace.held[moment, LOGITS]),
        activations=int(trace.held[moment, REST]),
    )
    return steady(sizes, zero) + Held(now)


def _process(held: Held, zero: Zero, gives_back: bool) -> Counter[str]:
    """What an allocator keeps beside what is asked for."""
    if not zero.on_cpu:
        return Counter(process=int(_GPU_RUNTIME + _GPU_FRAGMENTS * held.device.total()))
    passing = 0 if gives_back else held.device["activations"] + held.device["logits"]
    return Counter(process=int(_CPU_PROCESS + _KEPT * passing))
