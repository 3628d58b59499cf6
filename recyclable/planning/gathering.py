"""When ZeRO-3 has which parameters whole: DeepSpeed's fetching, prefetching and releasing, played through."""

from __future__ import annotations

from bisect import bisect_right
from collections import deque

import numpy as np

from recyclable.planning.states import Sizes, Zero
from recyclable.planning.trace import Trace


def gathered(sizes: Sizes, zero: Zero, trace: Trace) -> np.ndarray:
    """Bytes of whole parameters beside the partitions [T + 1, 2], the student's and the teacher's, at each moment.

    As `PartitionedParameterCoordinator` does it once it knows the order of modules: a module's parameters are fetched
    before it computes, those of the next modules ahead of them, and they are let go of behind it unless they are soon
    used again. What `steady` has (small parameters, which stay) is left out.
    """
    held = np.zeros((len(trace.held) + 1, 2), dtype=np.int64)
    elsewhere = zero.ranks > 1 or (zero.parameters_on != "none" and not zero.on_cpu)
    if zero.stage < 3 or not elsewhere:
        return held
    numel = {name: n for name, n in sizes.all().items() if n > zero.persistent}
    steps = [(use.moment, [name for name in use.parameters if name in numel]) for use in trace.uses]
    queue = deque((step, name) for step, (_, names) in enumerate(steps) for name in names)
    soon = _Soon(steps, numel, zero.reuse)
    here: set[str] = set()
    for step, (moment, names) in enumerate(steps):
        if step:
            behind = (name for name in steps[step - 1][1] if name not in names)
            here -= {name for name in behind if not soon(step - 1, name)}
        wanted = [name for name in names if name not in here]
        here.update(wanted)
        while queue and queue[0][0] <= step:
            queue.popleft()
        ahead: list[str] = []
        room = min(zero.max_live - sum(numel[name] for name in here), zero.prefetch)
        while queue and sum(numel[name] for name in ahead) < room:
            _, name = queue.popleft()
            if name not in here and name not in ahead:
                ahead.append(name)
        here.update(ahead)
        until = steps[step + 1][0] if step + 1 < len(steps) else len(held)
        taught = sum(numel[name] for name in here if name in sizes.teacher)
        held[moment:until] = zero.size * (sum(numel[name] for name in here) - taught), zero.size * taught
        fetched = max((sum(numel[name] for name in some) for some in (wanted, ahead)), default=0)
        held[moment, 0] += zero.size * fetched  # they are gathered side by side, and copied from there
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
