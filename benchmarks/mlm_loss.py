"""The masked tokens' cross-entropy at the sizes of one step on a CPU: the fused loss's time over the unfused one's.

    python benchmarks/mlm_loss.py [--quick] [--json]

Hidden size 384, vocabulary 30,522, forward and backward, head and bias included, one thread, for 600, 120 and 15 masked
tokens; fp32, and bf16 autocast over fp32 weights. Processor time, the best of several runs in turns; milliseconds are
reported on stderr. The peer is `cross_entropy` in fp32 of the linear layer's logits.
"""

from __future__ import annotations

import sys
import time

import few_shot
import torch
from torch.nn import functional as F

from recyclable.kernels import Head, LossSettings, distillation_loss

HIDDEN, VOCABULARY = 384, 30_522
TOKENS = (600, 120, 15)


def measure(quick: bool) -> dict[str, float]:
    """Precision and number of tokens -> ours over the peer's."""
    torch.set_num_threads(1)
    ratios = {}
    for precision in ("fp32", "bf16"):
        for tokens in TOKENS:
            spent = milliseconds(tokens, precision, 3 if quick else 10)
            told = ", ".join(f"{name} {value:.1f} ms" for name, value in spent.items())
            print(f"{tokens} tokens in {precision}: {told}", file=sys.stderr, flush=True)
            ratios[f"{precision}_{tokens}"] = spent["fused"] / spent["unfused"]
    return ratios


def milliseconds(tokens: int, precision: str, repeats: int) -> dict[str, float]:
    """Loss -> its best time."""
    torch.manual_seed(0)
    given = [
        torch.randn(tokens, HIDDEN),
        torch.randn(VOCABULARY, HIDDEN).mul_(2 * HIDDEN**-0.5),
        torch.zeros(VOCABULARY),
    ]
    targets = torch.randint(VOCABULARY, (tokens,))
    best: dict[str, float] = {}
    for repeat in range(repeats + 1):
        for name, loss in LOSSES.items():
            leaves = [tensor.clone().requires_grad_() for tensor in given]
            begin = time.process_time()
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                value = loss(*leaves, targets)
            value.backward()
            spent = 1000 * (time.process_time() - begin)
            if repeat:  # the first is to warm up
                best[name] = min(spent, best.get(name, spent))
    return best


def fused(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Ours."""
    return distillation_loss(hidden, Head(weight, bias), None, targets, LossSettings()).loss


def unfused(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The peer."""
    return F.cross_entropy(F.linear(hidden, weight, bias).float(), targets, reduction="sum")


LOSSES = {"fused": fused, "unfused": unfused}


if __name__ == "__main__":
    few_shot.main(measure, __doc__)
