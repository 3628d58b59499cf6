"""What one rank holds in each phase of a run, at its worst moment: start, teaching, training, step, evaluation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np

from recyclable.machine import MASTERED_AT_ONCE
from recyclable.planning.gathering import gathered
from recyclable.planning.states import FP32, Held, Sizes, Zero, copied, in_partition, share, steady
from recyclable.planning.trace import DEVICE, HOST, LOGITS, REST, TEACHER, Trace

_ALLREDUCE = 500_000_000
"""Elements of gradients that plain data parallelism adds up at once (DeepSpeed's `MEMORY_OPT_ALLREDUCE_SIZE`)."""
_NORM = 8
"""Bytes of an element while norms are found, tensor by tensor."""

_CPU_PROCESS = 22_000_000
"""What a process grows by beside tensors: threads, hooks, small blocks. Fitted, docs/planning_memory.md."""
_CPU_IMPORTS = 42_000_000
"""What torch's compiler takes, which DeepSpeed imports with the first of its ZeRO optimizers (measured)."""
_KEPT = 1.0
"""Of what comes and goes, what glibc may keep beside it: 26 to about 70% was seen, most where lengths change."""
_HALF_PRODUCT = 2 * 256 * 1024
"""What oneDNN keeps for a product of half precision of other shapes: two pieces of compiled code, each in a buffer of
the size that its generator begins with (`jit_generator`). 0.54 MB were measured; products in fp32 have nearly none."""
_GPU_RUNTIME = 800_000_000
"""CUDA's context and NCCL's buffers: nominal, not measured here."""
_GPU_FRAGMENTS = 0.05
"""What torch's caching allocator keeps beside what is in use: nominal, not measured here."""


def phases(
    sizes: Sizes,
    zero: Zero,
    training: Trace,
    evaluation: Trace | None,
    saves: bool = False,
    gives_back: bool = True,
    asked: int = 0,
) -> dict[str, Held]:
    """Phase -> bytes at its worst moment.

    Args:
        saves: whether checkpoints are written. One is under way beside whatever comes next, whole at first.
        gives_back: whether a CPU's allocator gives back what is freed, as `memory` has it.
        asked: elements of a teacher that answers before training.
    """
    found = {"start": _start(sizes, zero), "training": _training(sizes, zero, training), "step": _step(sizes, zero)}
    products = training.half_products
    if evaluation is not None:
        found["evaluation"] = _evaluation(sizes, zero, evaluation)
        products |= evaluation.half_products
    for name in found.keys() & {"step", "evaluation"}:
        found[name].device["buckets"] += zero.size * _stays(sizes, zero, training)
    if asked:
        found["teaching"] = _teaching(sizes, zero, evaluation or training, asked)
    for name, held in found.items():
        if saves and name not in ("start", "teaching"):
            held.host["checkpoint"] = copied(sizes, zero)
        held.device += _process(held, zero, gives_back)
        if zero.on_cpu:
            held.device["process"] += _HALF_PRODUCT * len(products)
    return found


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
    size = zero.size
    gradients, buckets = np.zeros(moments, dtype=np.int64), np.zeros(moments, dtype=np.int64)
    buckets += size * _stays(sizes, zero, trace)
    if zero.stage == 0:
        gradients[:-1], gradients[-1] = trace.done, trace.done[-1]
        if zero.accumulating:
            gradients[:] = trace.done[-1]
        if zero.ranks > 1:
            buckets[-1] += min(size * _ALLREDUCE, int(trace.done[-1]))
        return gradients, buckets
    worst: dict[int, tuple[int, int]] = {}
    latest = np.zeros(moments, dtype=np.int64)  # which of the changes holds at a moment: none, then one by one
    changes = [(0, int(buckets[0]))]
    for moment, kept, through in _reduced(sizes, zero, trace):
        latest[moment] = len(changes)
        changes.append((kept, through))
        worst[moment] = max(worst.get(moment, (0, 0)), (kept, through), key=sum)
    gradients[:], buckets[:] = np.array(changes, dtype=np.int64)[np.maximum.accumulate(latest)].T
    for moment, (kept, through) in worst.items():
        gradients[moment], buckets[moment] = kept, through
    if not zero.on_cpu and zero.stage < 3:
        buckets = np.maximum(buckets, 0) + size * zero.reduce_bucket * zero.buckets
    if zero.stage < 3 and zero.accumulating and zero.optimizer_on == "none":
        gradients += size * sum(sizes.trained[name] for name in in_partition(sizes, zero.ranks))
    return gradients, buckets


def _stays(sizes: Sizes, zero: Zero, trace: Trace) -> int:
    """Elements of ZeRO-3's bucket whose pages a CPU has: it is there for good, and was filled so far before."""
    if zero.stage < 3 or not zero.on_cpu:
        return 0
    most = filled = 0
    for n in (sizes.trained[name] for name, _ in trace.order):
        filled = n if filled + n > zero.reduce_bucket else filled + n
        most = max(most, filled if n <= zero.reduce_bucket else 0)
    return most


def _reduced(sizes: Sizes, zero: Zero, trace: Trace) -> Iterator[tuple[int, int, int]]:
    """(moment, bytes of gradients, bytes of buckets) from that moment on, as ZeRO reduces gradients bucket by bucket.

    ZeRO-1 waits for the last gradient and then goes through them in the model's order.
    """
    owned = in_partition(sizes, zero.ranks) if zero.stage < 3 and zero.optimizer_on == "none" else frozenset()
    last, size = len(trace.held), zero.size
    order = list(trace.order)
    waiting: list[str] = []
    filled = kept = unreduced = 0
    touched = _stays(sizes, zero, trace)

    def now(moment: int, copies: int = 0) -> tuple[int, int, int]:
        through = (touched if zero.on_cpu else 0) + copies
        return moment, size * (kept + unreduced), size * through

    def reduce(moment: int) -> Iterator[tuple[int, int, int]]:
        nonlocal filled, kept, unreduced
        # Side by side by rank; gloo, which has no reduce-scatter, copies that once more.
        copies = 2 if zero.stage == 3 and zero.on_cpu else 1 if zero.ranks > 1 or zero.stage == 3 else 0
        yield now(moment, copies * sum(sizes.trained[name] for name in waiting))
        if zero.optimizer_on != "none":  # each norm is found on the way to the host, in fp64
            flat = sum(sizes.trained[name] for name in waiting) if zero.stage == 3 else 0
            largest = max((sizes.trained[name] for name in waiting), default=0)
            whole = largest if zero.stage < 3 else -(-largest // zero.ranks)
            yield now(moment, flat + whole * _NORM // size)
        kept += sum(sizes.trained[name] for name in waiting if name in owned)
        yield now(moment)  # what was kept, copied out of the bucket
        unreduced -= sum(n for n in (sizes.trained[name] for name in waiting) if n > zero.reduce_bucket)
        waiting.clear()
        filled = 0
        yield now(moment)

    if zero.stage == 1:
        names = {name for name, _ in order}
        for name, moment in order:
            unreduced += sizes.trained[name]
            yield now(moment)
        order = [(name, last) for group in sizes.groups() for name in group if name in names]
    for name, moment in order:
        n = sizes.trained[name]
        large = n > zero.reduce_bucket
        if waiting and filled + n > zero.reduce_bucket:
            yield from reduce(moment - 1)  # the new one is there already
        waiting.append(name)
        filled += n
        if zero.stage == 1:
            unreduced -= 0 if large else n
        elif large:
            unreduced += n
        if not large:
            touched = max(touched, filled)
        yield now(moment if large else moment - 1)  # copied while the original is there
    yield from reduce(last)


def _step(sizes: Sizes, zero: Zero) -> Held:
    """Gradients are flattened by group, brought to fp32, their norm found in fp64."""
    held = steady(sizes, zero)
    largest = max((sum(group.values()) for group in sizes.groups()), default=0)
    most = max(sizes.trained.values(), default=0)
    norm = _NORM * (most if zero.stage < 3 else -(-most // zero.ranks))
    if zero.stage == 0:
        trained = sum(sizes.trained.values())
        held.device["gradients"] = zero.size * trained
        if zero.size < FP32:
            held.device["gradients"] += FP32 * min(trained, max(most, MASTERED_AT_ONCE))
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


def _teaching(sizes: Sizes, zero: Zero, trace: Trace, asked: int) -> Held:
    """A teacher of the student's shape answers beside it, in forward passes; nothing of the optimizer is there yet."""
    held = _evaluation(sizes, zero, trace)
    for part in ("optimizer", "gradients", "buckets"):
        held.device[part] = held.host[part] = held.nvme[part] = 0
    where = held.at(zero.parameters_on) if zero.stage == 3 else held.device
    where["teacher"] += zero.size * (-(-asked // zero.ranks) if zero.stage == 3 else asked)
    return held


def _process(held: Held, zero: Zero, gives_back: bool) -> Counter[str]:
    """What an allocator keeps beside what is asked for."""
    if not zero.on_cpu:
        return Counter(process=int(_GPU_RUNTIME + _GPU_FRAGMENTS * held.device.total()))
    passing = 0 if gives_back else held.device["activations"] + held.device["logits"]
    imports = _CPU_IMPORTS if zero.stage else 0
    return Counter(process=int(_CPU_PROCESS + imports + _KEPT * passing))
