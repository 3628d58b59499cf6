"""The losses of a language model's head on the CPU: memory and time of the fused ones over the unfused ones.

    python benchmarks/lm_loss.py [--quick] [--json]

Distillation: 4,096 tokens, hidden size 768, vocabulary 50,000, fp32: 0.5 CE + 0.5 T² KL(teacher/T ‖ student/T), T = 2,
teacher's head included, forward and backward. The peer is the loss as it is usually written: both logits,
`cross_entropy`, `kl_div` of two `log_softmax`.
`causal`: cross-entropy of 1,024 tokens, hidden size 640, vocabulary 262,144 (Gemma 3's head), fp32, forward and
backward; the peer is `cross_entropy` of all logits. `bf16_loss_diff` is how far the mean loss of states and head in
bf16 is from fp32's of the same numbers; torch's own `linear_cross_entropy`, whole and in chunks, is told on stderr.
Each run has a process of its own, ours and the peer's in turns; of several the median counts. One thread, unless
OMP_NUM_THREADS says otherwise. Time is the process's, so that others on the machine count little.
Memory is the process's resident high-water mark, reset when the inputs exist, less what was resident then: it contains
the gradients, which both must return. Linux only (/proc).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn import functional as F

from recyclable.kernels import Head, LossSettings, TaughtStates, distillation_loss

TEMPERATURE = 2.0
Given = tuple[torch.Tensor, ...]
SHAPES = {"distillation": (4096, 768, 50_000), "causal": (1024, 640, 262_144)}
"""Tokens, hidden size, vocabulary."""
FEW = 128
"""Tokens on which torch's own loss is asked for its error: its chunks take a minute for all."""


def main() -> None:
    """Print the ratios; `--run` is the process of one run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="distillation of 2,048 tokens; one run of each")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--run", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--tokens", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        print(json.dumps(run(*arguments.run, arguments.tokens)))
        return
    figures = measure(arguments.quick)
    if arguments.json:
        print(json.dumps(figures))
        return
    for name, found in {"distillation": figures, "causal": figures["causal"]}.items():
        print(f"{name}: memory {found['memory_ratio']:.3f}, time {found['time_ratio']:.3f} of the unfused loss's")
    print(f"causal: the loss in bf16 is off by {figures['causal']['bf16_loss_diff']:.1e}")


def measure(quick: bool) -> dict[str, float | dict[str, float]]:
    """`memory_ratio` and `time_ratio`, ours over the peer's, of distillation and `causal`; runs are told on stderr."""
    return {
        **compared("distillation", 2048 if quick else SHAPES["distillation"][0], 1 if quick else 3),
        "causal": {**compared("causal", SHAPES["causal"][0], 1 if quick else 5), "bf16_loss_diff": bf16_loss_diff()},
    }


def compared(loss: str, tokens: int, repeats: int) -> dict[str, float]:
    """Both ratios of a loss."""
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    every: dict[str, list[dict[str, float]]] = {name: [] for name in LOSSES[loss]}
    for _ in range(repeats):
        for name, found in every.items():
            command = [sys.executable, __file__, "--run", loss, name, "--tokens", str(tokens)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
            found.append(json.loads(done.stdout))
            told = f"{found[-1]['seconds']:.2f} s, {found[-1]['bytes'] / 2**20:.0f} MiB"
            print(f"{loss}, {name}, {tokens} tokens: {told}", file=sys.stderr, flush=True)

    def ratio(what: str) -> float:
        ours, peer = (statistics.median(one[what] for one in every[name]) for name in ("fused", "unfused"))
        return ours / peer

    return {"memory_ratio": ratio("bytes"), "time_ratio": ratio("seconds")}


def run(loss: str, name: str, tokens: int) -> dict[str, float]:
    """Peak bytes above the inputs, and seconds, of one forward and backward pass."""
    _, hidden, vocabulary = SHAPES[loss]
    compute = LOSSES[loss][name]

    def once(given: Given) -> None:
        (compute(*given) / len(given[1])).backward()

    once(inputs(loss, 64, hidden, 1024))  # libraries loaded and threads started before anything is counted
    given = inputs(loss, tokens, hidden, vocabulary)
    Path("/proc/self/clear_refs").write_text("5")
    before, started = _status("VmRSS"), time.process_time()
    once(given)
    return {"seconds": time.process_time() - started, "bytes": _status("VmHWM") - before}


def inputs(loss: str, tokens: int, hidden: int, vocabulary: int) -> Given:
    """Student's hidden states, targets and head, a teacher's states and head; logits of a standard deviation of 2."""
    torch.manual_seed(0)
    models = 2 if loss == "distillation" else 1
    states = [torch.randn(tokens, hidden) for _ in range(models)]
    heads = [torch.randn(vocabulary, hidden).mul_(2 * hidden**-0.5) for _ in range(models)]
    targets = torch.randint(vocabulary, (tokens,))
    return states[0].requires_grad_(), targets, heads[0].requires_grad_(), *states[1:], *heads[1:]


def fused(hidden: torch.Tensor, targets: torch.Tensor, head: torch.Tensor, *taught: torch.Tensor) -> torch.Tensor:
    """Ours, summed; with the states and the head of a teacher, where there is one."""
    if not taught:
        return distillation_loss(hidden, Head(head), None, targets, LossSettings()).loss
    teacher, teacher_head = taught
    settings = LossSettings(temperature=TEMPERATURE, hard_weight=0.5, soft_weight=0.5)
    return distillation_loss(hidden, Head(head), TaughtStates(teacher, Head(teacher_head)), targets, settings).loss


def unfused_distillation(
    hidden: torch.Tensor, targets: torch.Tensor, head: torch.Tensor, teacher: torch.Tensor, teacher_head: torch.Tensor
) -> torch.Tensor:
    """The peer."""
    with torch.no_grad():
        soft = F.log_softmax(teacher @ teacher_head.T / TEMPERATURE, dim=-1)
    logits = hidden @ head.T
    hard = F.cross_entropy(logits, targets, reduction="sum")
    student = F.log_softmax(logits / TEMPERATURE, dim=-1)
    kd = F.kl_div(student, soft, reduction="sum", log_target=True)
    return 0.5 * hard + 0.5 * TEMPERATURE**2 * kd


def unfused_causal(hidden: torch.Tensor, targets: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    """The peer."""
    return F.cross_entropy(hidden @ head.T, targets, reduction="sum")


LOSSES: dict[str, dict[str, Callable[..., torch.Tensor]]] = {
    "distillation": {"fused": fused, "unfused": unfused_distillation},
    "causal": {"fused": fused, "unfused": unfused_causal},
}


@torch.no_grad()
def bf16_loss_diff() -> float:
    """|mean loss in bf16 - that of the same numbers in fp32|; torch's is told on stderr."""
    hidden, targets, head = inputs("causal", *SHAPES["causal"])
    hidden, head = hidden.bfloat16(), head.bfloat16()

    def off(loss: Callable[..., torch.Tensor], tokens: int) -> float:
        states, wanted = hidden[:tokens], targets[:tokens]
        exact = unfused_causal(states.float(), wanted, head.float())
        return abs(float(loss(states, wanted, head)) - float(exact)) / tokens

    peers = {"whole": None, "in chunks": torch.nn.LinearCrossEntropyOptions()}
    for name, options in peers.items():

        def peer(
            states: torch.Tensor, wanted: torch.Tensor, head: torch.Tensor, options: object = options
        ) -> torch.Tensor:
            return F.linear_cross_entropy(states, head, wanted, options=options).float() * len(wanted)

        told = f"torch's linear_cross_entropy, {name}, is off by {off(peer, FEW):.4f}, ours by {off(fused, FEW):.1e}"
        print(f"bf16, {FEW} tokens: {told}", file=sys.stderr, flush=True)
    return off(fused, len(targets))


def _status(field: str) -> int:
    """Bytes, from the process's status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) * 1024


if __name__ == "__main__":
    main()
