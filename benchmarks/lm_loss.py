"""Distillation of a language model's head on the CPU: memory and time of the fused loss over the unfused one.

    python benchmarks/lm_loss.py [--quick] [--json]

4,096 tokens, hidden size 768, vocabulary 50,000, fp32: 0.5 CE + 0.5 T² KL(teacher/T ‖ student/T), T = 2, teacher's head
included, forward and backward. The peer is the loss as it is usually written: both logits, `cross_entropy`, `kl_div` of
two `log_softmax`. Each run has a process of its own, ours and the peer's in turns; of several the fastest counts. One
thread, unless OMP_NUM_THREADS says otherwise.
Memory is the process's resident high-water mark, reset when the inputs exist, less what was resident then: it contains
the gradients, which both must return. Linux only (/proc).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch.nn import functional as F

from recyclable.kernels import Head, LossSettings, TaughtStates, distillation_loss

HIDDEN, VOCABULARY, TEMPERATURE = 768, 50_000, 2.0


def main() -> None:
    """Print the two ratios; `--run` is the process of one run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="2,048 tokens, one run of each")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--run", choices=LOSSES, help=argparse.SUPPRESS)
    parser.add_argument("--tokens", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        print(json.dumps(run(arguments.run, arguments.tokens)))
        return
    figures = measure(arguments.quick)
    if arguments.json:
        print(json.dumps(figures))
    else:
        print(f"memory {figures['memory_ratio']:.3f}, time {figures['time_ratio']:.3f} of the unfused loss's")


def measure(quick: bool) -> dict[str, float]:
    """`memory_ratio` and `time_ratio`, ours over the peer's; every run is reported on stderr."""
    tokens, repeats = (2048, 1) if quick else (4096, 3)
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    best: dict[str, dict[str, float]] = {}
    for _ in range(repeats):
        for name in LOSSES:
            command = [sys.executable, __file__, "--run", name, "--tokens", str(tokens)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
            found = json.loads(done.stdout)
            print(
                f"{name}, {tokens} tokens: {found['seconds']:.2f} s, {found['bytes'] / 2**20:.0f} MiB", file=sys.stderr
            )
            best[name] = {key: min(value, best.get(name, found)[key]) for key, value in found.items()}
    return {
        "memory_ratio": best["fused"]["bytes"] / best["unfused"]["bytes"],
        "time_ratio": best["fused"]["seconds"] / best["unfused"]["seconds"],
    }


def run(name: str, tokens: int) -> dict[str, float]:
    """Peak bytes above the inputs, and seconds, of one forward and backward pass."""
    compute(name, *inputs(64, 1024))  # libraries loaded and threads started before anything is counted
    given = inputs(tokens, VOCABULARY)
    Path("/proc/self/clear_refs").write_text("5")
    before, started = _status("VmRSS"), time.perf_counter()
    compute(name, *given)
    return {"seconds": time.perf_counter() - started, "bytes": _status("VmHWM") - before}


def inputs(tokens: int, vocabulary: int) -> tuple[torch.Tensor, ...]:
    """Student's hidden states and head, teacher's, targets; logits of a standard deviation of 2."""
    torch.manual_seed(0)
    states = [torch.randn(tokens, HIDDEN) for _ in range(2)]
    heads = [torch.randn(vocabulary, HIDDEN).mul_(2 * HIDDEN**-0.5) for _ in range(2)]
    targets = torch.randint(vocabulary, (tokens,))
    return states[0].requires_grad_(), heads[0].requires_grad_(), states[1], heads[1], targets


def compute(name: str, *given: torch.Tensor) -> None:
    """The mean loss and its gradients."""
    (LOSSES[name](*given) / len(given[-1])).backward()


def fused(
    hidden: torch.Tensor, head: torch.Tensor, teacher: torch.Tensor, teacher_head: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    """Ours."""
    settings = LossSettings(temperature=TEMPERATURE, hard_weight=0.5, soft_weight=0.5)
    return distillation_loss(hidden, Head(head), TaughtStates(teacher, Head(teacher_head)), targets, settings).loss


def unfused(
    hidden: torch.Tensor, head: torch.Tensor, teacher: torch.Tensor, teacher_head: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    """The peer."""
    with torch.no_grad():
        soft = F.log_softmax(teacher @ teacher_head.T / TEMPERATURE, dim=-1)
    logits = hidden @ head.T
    hard = F.cross_entropy(logits, targets, reduction="sum")
    student = F.log_softmax(logits / TEMPERATURE, dim=-1)
    kd = F.kl_div(student, soft, reduction="sum", log_target=True)
    return 0.5 * hard + 0.5 * TEMPERATURE**2 * kd


LOSSES = {"fused": fused, "unfused": unfused}


def _status(field: str) -> int:
    """Bytes, from the process's status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) * 1024


if __name__ == "__main__":
    main()
