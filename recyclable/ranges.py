"""Says what a step is doing, for a profiler's trace; where no profiler is on it costs nothing."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from torch.autograd import _profiler_enabled  # type: ignore[attr-defined]
from torch.profiler import record_function

DATA, FORWARD, LOSS, BACKWARD, OPTIMIZER = "data", "forward", "loss", "backward", "optimizer"
"""Of a step; a loss is computed within a forward pass."""
EVALUATION, SAVING = "evaluation", "saving"
"""Between steps."""
_NOTHING: AbstractContextManager[None] = nullcontext()


def phase(name: str) -> AbstractContextManager[object]:
    """While it lasts, what is done is `name`; of phases within each other the innermost counts."""
    return record_function(name) if _profiler_enabled() else _NOTHING
