"""When ZeRO-3 has which parameters whole: DeepSpeed's fetching, prefetching and releasing, played through."""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Iterable

import numpy as np

from recyclable.planning.states import Sizes, Zero
from recyclable.planning.trace import Trace


def gathered(sizes: Sizes, zero: Zero, trace: Trace) -> np.ndarray:
    """Bytes of whole parameters beside the partitions [T + 1, 2], the student's and the teacher's, at each moment.

    As `PartitionedParameterCoordinator` does it once it knows the order of modules: a module's parameters are fetched
    before it computes, those of the next modules ahead of them (from the outermost module on, which has none itself),
    and they are let go of behind it unless they are soon used again. Those that are fetched together arrive side by
    side in one buffer, all are copied from there as soon as one of them is needed, and the buffer goes when the last
    of them was (`AllGatherCoalescedHandle`): until then each is there twice. One that is fetched alone stays where it
    arrives. Gloo gathers into a buffer of its own and copies from there (`ProcessGroupGloo::_allgather_base`). What
    `steady` has (small parameters, which stay) is left out.
    """
    held = np.zeros((len(trace.held) + 1, 2), dtype=np.int64)
    elsewhere = zero.ranks > 1 or (zero.parameters_on != "none" and not zero.on_cpu)
    if zero.stage < 3 or not elsewhere:
        return held
    numel = {name: n for name, n in sizes.all().items() if n > zero.persistent}
    uses = [(use.moment, [name for name in use.parameters if name in numel]) for use in trace.uses]
    steps: list[tuple[int, list[str]]] = [(0, []), *uses]
    queue = deque((step, name) for step, (_, names) in enumerate(steps) for name in names)
    soon = _Soon(steps, numel, zero.reuse)
    here: set[str] = set()
    flying: dict[str, list[str]] = {}  # not needed yet -> those that it came with
    passing: list[tuple[int, int]] = []  # within one moment
    claimed: dict[str, int] = {}  # the step for which fetching ahead found it here: it stays until then

    def count(names: Iterable[str]) -> int:
        return sum(numel[name] for name in names)

    def fetch(names: list[str]) -> None:
        if zero.ranks > 1 and len(names) > 1:
            flying.update(dict.fromkeys(names, names))
        else:
            here.update(names)
        through_gloo = count(names) if zero.ranks > 1 and zero.on_cpu else 0
        passing.append(now(through_gloo))

    def now(more: int = 0) -> tuple[int, int]:
        taught = count(name for name in here if name in sizes.teacher)
        buffers = sum(count(names) for names in {id(names): names for names in flying.values()}.values())
        return zero.size * (count(here) - taught + buffers + more), zero.size * taught

    for step, (moment, names) in enumerate(steps):
        if step:
            behind = (name for name in steps[step - 1][1] if name not in names and claimed.get(name, 0) <= step)
            here -= {name for name in behind if not soon(step - 1, name)}
        if step and moment > steps[step - 1][0]:
            passing.clear()
        fetch([name for name in names if name not in here and name not in flying])
        for name in names:
            if name not in here:
                here.update(flying[name])
        passing.append(now())
        for name in names:
            flying.pop(name, None)
        while queue and queue[0][0] <= step:
            queue.popleft()
        ahead: list[str] = []
        room = min(zero.max_live - count(here | flying.keys()), zero.prefetch)
        while queue and count(ahead) < room:
            used, name = queue.popleft()
            claimed[name] = used
            if name not in here and name not in flying and name not in ahead:
                ahead.append(name)
        fetch(ahead)
        until = steps[step + 1][0] if step + 1 < len(steps) else len(held)
        held[moment:until] = now()
        held[moment] = max(passing, key=sum)
    return held


class _Soon:
    """Whether a parameter is used again before too many others are, or belongs to several modules."""

    def __init__(self, steps: list[tuple[int, list[str]]], numel: dict[str, int], reuse: int) -> None:
        self.reuse, self.before, self.at = reuse, [0], dict[str, list[int]]()
        for step, (_, names) in enumerate(steps):
            self.before.append(self.before[-1] + sum(numel[name] for name in names))
            for name in names:
                self.at.setdefault(name, []).append(step)

    def __call__(self, step: int, name: str) -> bool:
        """After that step."""
        at = self.at[name]
        following = bisect_right(at, step)
        return following < len(at) and self.before[at[following]] - self.before[step + 1] < self.reuse
