"""The fused distillation loss on a GPU, beside liger-kernel, torch.compile and the matrix products alone.

    python benchmarks/kernels.py [--quick] [--json]      needs a CUDA GPU of 80 GB and, for its row, liger-kernel
    python benchmarks/kernels.py --errors [--json]       on any machine: what is rounded, no times

bf16, hidden size 4096: half cross-entropy, half Jensen-Shannon, forward and backward, both heads included. Peers:
liger-kernel's chunked JSD (its defaults), the same formula under torch.compile, and the four matrix products that none
can do without (two logits, the gradients of hidden states and weight), unchunked where they fit. Milliseconds are the
median of ten runs by CUDA events after three to warm up, bytes the allocator's peak, inputs included. `ours_bf16` is
ours with `logits: bf16`. `..._loss_error`, `..._hidden_error` and `..._weight_error` are what the loss and the
gradients of hidden states and weight are off by, relative to their norm, on 256 tokens, from the formula in fp64 on the
same inputs (`kernels.reference_loss`). `to_products` and `to_floor` are ours over the products' time and over 8 M H V
FLOP at the card's nominal bf16 peak, `ours_bf16_to_products` is that of `ours_bf16`. A peer that is not installed or
runs out of memory is null.

`--errors`: these three at a vocabulary of 30,522, a row for each of ours, the unfused formula, and `rounded`: fp64's
results in the dtypes that they are given away in.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from statistics import median
from typing import Any

import torch
from torch.nn import functional as F

from recyclable.kernels import Head, LossSettings, TaughtStates, distillation_loss, reference_loss
from recyclable.planning.devices import peak_flops
from recyclable.report.compare import table

HIDDEN = 4096
TOKENS = (1024, 2048, 4096, 8192, 16384, 32768)
ERROR_TOKENS = 256
VOCABULARIES = (30_522, 50_257, 128_256, 256_000)
SETTINGS = LossSettings("jensen_shannon", mixing=0.5, hard_weight=0.5, soft_weight=0.5)
OF = ("loss", "hidden", "weight")
"""What errors are told of: the loss, the gradients of hidden states and of the student's head."""
Step = Callable[[], torch.Tensor | None]
"""Computes once; returns the loss, where there is one."""
Maker = Callable[..., Step | None]
"""Makes a step of `inputs`; None where that peer is not there."""


def main() -> None:
    """Print the table, or one JSON object, its `rows` a list."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="1,024 and 8,192 tokens at a vocabulary of 128,256")
    parser.add_argument("--errors", action="store_true", help="errors against fp64 alone, on a GPU or else on the CPU")
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    arguments = parser.parse_args()
    rows = off_from_fp64() if arguments.errors else measure(arguments.quick)
    if arguments.json:
        print(json.dumps({"rows": rows}))
    elif arguments.errors:
        print(table([{"who": row["who"], **{what: f"{row[what]:.2e}" for what in OF}} for row in rows]))
    elif rows:
        print(table(rows))


def measure(quick: bool) -> list[dict[str, Any]]:
    """One row per size; none, and a line on stderr that says why, without a GPU."""
    if not torch.cuda.is_available():
        print("benchmarks/kernels.py: no CUDA GPU here, nothing was measured", file=sys.stderr)
        return []
    sizes = [(tokens, size) for size in VOCABULARIES for tokens in TOKENS]
    if quick:
        sizes = [(1024, 128_256), (8192, 128_256)]
    rows = []
    for tokens, vocabulary in sizes:
        print(f"{tokens} tokens, vocabulary {vocabulary}", file=sys.stderr)
        rows.append(row(tokens, vocabulary))
    return rows


def row(tokens: int, vocabulary: int) -> dict[str, Any]:
    """Milliseconds and peak bytes of everybody at one size."""
    found: dict[str, Any] = {"tokens": tokens, "hidden": HIDDEN, "vocabulary": vocabulary}
    for name, make in PEERS.items():
        found[f"{name}_ms"], found[f"{name}_bytes"] = timed(make, tokens, vocabulary)
    for name, told in errors({name: PEERS[name] for name in ERRED}, vocabulary).items():
        found |= {f"{name}_{what}_error": None if told is None else told[what] for what in OF}
    found["ours_bf16_to_products"] = ratio(found["ours_bf16_ms"], found["products_ms"])
    peak = peak_flops()
    floor = None if peak is None else 8 * tokens * HIDDEN * vocabulary / peak * 1e3
    for name, base in (("products", found["products_ms"]), ("floor", floor)):
        found[f"to_{name}"] = ratio(found["ours_ms"], base)
    return found


def ratio(one: float | None, other: float | None) -> float | None:
    """Null where either is."""
    return one / other if one and other else None


def timed(make: Maker, tokens: int, vocabulary: int) -> tuple[Any, Any]:
    """Median milliseconds and peak bytes of what `make` returns for the inputs, or two nulls."""
    torch.compiler.reset()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    try:
        step = make(*inputs(tokens, HIDDEN, vocabulary, "cuda", torch.bfloat16))
        if step is None:
            return None, None
        for _ in range(3):
            step()
        torch.cuda.reset_peak_memory_stats()
        times = []
        for _ in range(10):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            step()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end))
        return median(times), torch.cuda.max_memory_allocated()
    except torch.cuda.OutOfMemoryError:
        return None, None


def off_from_fp64() -> list[dict[str, Any]]:
    """A row for each of ours, for the unfused formula and for rounding alone."""
    makers = {"ours": PEERS["ours"], "ours_bf16": PEERS["ours_bf16"], "unfused": usual}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = errors(makers, VOCABULARIES[0], device=device, rounded=True)
    return [{"who": name, **(told or {})} for name, told in found.items()]


def errors(
    makers: Mapping[str, Maker], vocabulary: int, hidden: int = HIDDEN, device: str = "cuda", rounded: bool = False
) -> dict[str, dict[str, float] | None]:
    """Relative errors `OF` each peer's results against fp64, norm by norm; None for a peer that is not.

    Args:
        rounded: also under this name what is off where nothing but the results is rounded, the loss to fp32.
    """
    given = inputs(ERROR_TOKENS, hidden, vocabulary, device, torch.bfloat16)
    states, head, teacher, other, targets = (t.detach().double() if t.is_floating_point() else t for t in given)
    states.requires_grad_()
    head.requires_grad_()
    sums = reference_loss(states, Head(head), TaughtStates(teacher, Head(other)), targets, SETTINGS)
    (sums.loss / len(targets)).backward()
    exact = (sums.loss.detach() / len(targets), states.grad, head.grad)
    found: dict[str, dict[str, float] | None] = {}
    for name, make in makers.items():
        step = make(*given)
        told = None if step is None else (step(), given[0].grad, given[1].grad)
        found[name] = None if told is None else _off(told, exact)
    if rounded:
        dtypes = (torch.float32, torch.bfloat16, torch.bfloat16)
        found["rounded"] = _off([tensor.to(dtype) for tensor, dtype in zip(exact, dtypes, strict=True)], exact)
    return found


def _off(found: Sequence[torch.Tensor], exact: Sequence[torch.Tensor]) -> dict[str, float]:
    pairs = zip(OF, found, exact, strict=True)
    return {what: ((one.double() - right).norm() / right.norm()).item() for what, one, right in pairs}


def inputs(tokens: int, hidden: int, vocabulary: int, device: str, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Student's hidden states and head, teacher's, targets; logits of a standard deviation of 2."""
    torch.manual_seed(0)
    states = [torch.randn(tokens, hidden, device=device, dtype=dtype) for _ in range(2)]
    heads = [torch.randn(vocabulary, hidden, device=device, dtype=dtype).mul_(2 * hidden**-0.5) for _ in range(2)]
    targets = torch.randint(vocabulary, (tokens,), device=device)
    return states[0].requires_grad_(), heads[0].requires_grad_(), states[1], heads[1], targets


def training_step(loss: Callable[..., torch.Tensor], *given: torch.Tensor) -> torch.Tensor:
    """Forward and backward; gradients are new ones each time, as after `zero_grad`. Returns the loss."""
    given[0].grad = given[1].grad = None
    value = loss(*given)
    value.backward()
    return value.detach()


def ours(*given: torch.Tensor, settings: LossSettings = SETTINGS) -> Step:
    """`distillation_loss`, as a mean over tokens."""

    def loss(
        hidden: torch.Tensor, head: torch.Tensor, teacher: torch.Tensor, other: torch.Tensor, targets: torch.Tensor
    ) -> torch.Tensor:
        sums = distillation_loss(hidden, Head(head), TaughtStates(teacher, Head(other)), targets, settings)
        return sums.loss / len(targets)

    return partial(training_step, loss, *given)


def liger(*given: torch.Tensor) -> Step | None:
    """liger-kernel's chunked JSD with its own defaults."""
    if find_spec("liger_kernel") is None:
        return None
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    return partial(training_step, LigerFusedLinearJSDLoss(), *given)


def compiled(*given: torch.Tensor) -> Step:
    """The unfused formula under torch.compile."""
    return partial(training_step, torch.compile(unfused), *given)


def usual(*given: torch.Tensor) -> Step:
    """The unfused formula as it stands."""
    return partial(training_step, unfused, *given)


def unfused(
    hidden: torch.Tensor, head: torch.Tensor, teacher: torch.Tensor, other: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    """The loss as it is usually written: bf16 logits, fp32 softmax."""
    student = (hidden @ head.T).float()
    with torch.no_grad():
        log_p = (teacher @ other.T).float().log_softmax(-1)
    log_q = student.log_softmax(-1)
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    kd = sum(F.kl_div(log_m, side, reduction="sum", log_target=True) for side in (log_p, log_q)) / 2
    return (0.5 * F.nll_loss(log_q, targets, reduction="sum") + 0.5 * kd) / len(targets)


def products(
    hidden: torch.Tensor, head: torch.Tensor, teacher: torch.Tensor, other: torch.Tensor, targets: torch.Tensor
) -> Step:
    """The four matrix products in bf16, in as few chunks as keep two logits matrices below 20 GB."""
    rows = min(len(hidden), 5 * 10**9 // len(head))
    student, teaching = (torch.empty(rows, len(head), dtype=hidden.dtype, device=hidden.device) for _ in range(2))
    to_hidden, to_head = torch.empty_like(hidden), torch.empty_like(head)

    @torch.no_grad()
    def run() -> None:
        for start in range(0, len(hidden), rows):
            chunk = slice(start, start + rows)
            count = len(hidden[chunk])
            torch.mm(hidden[chunk], head.T, out=student[:count])
            torch.mm(teacher[chunk], other.T, out=teaching[:count])
            torch.mm(student[:count], head, out=to_hidden[chunk])
            torch.mm(student[:count].T, hidden[chunk], out=to_head)

    return run


PEERS = {
    **{"ours": ours, "ours_bf16": partial(ours, settings=replace(SETTINGS, logits="bf16"))},
    **{"liger": liger, "compile": compiled, "products": products},
}
ERRED = ("ours", "ours_bf16", "liger", "compile")


if __name__ == "__main__":
    main()
