"""The fused loss at real sizes on a GPU: right, bounded in memory, and without a wait for the device."""

from __future__ import annotations

import pytest
import torch

from recyclable.kernels import (
    DIVERGENCES,
    Head,
    LossSettings,
    LossSums,
    TaughtStates,
    distillation_loss,
    reference_loss,
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def problem(tokens: int, hidden: int, vocabulary: int) -> tuple[torch.Tensor, Head, TaughtStates, torch.Tensor]:
    torch.manual_seed(0)
    states = [torch.randn(tokens, hidden, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    heads = [torch.randn(vocabulary, hidden, device="cuda", dtype=torch.bfloat16) * 5 * hidden**-0.5 for _ in range(2)]
    targets = torch.randint(vocabulary, (tokens,), device="cuda")
    targets[::7] = -100
    return states[0], Head(heads[0]), TaughtStates(states[1], Head(heads[1])), targets


def exact(
    hidden: torch.Tensor, head: Head, teacher: TaughtStates, targets: torch.Tensor, wanted: LossSettings
) -> tuple[LossSums, torch.Tensor, torch.Tensor]:
    """The reference in float64, a few tokens at a time."""
    weight = head.weight.double().requires_grad_()
    leaf = hidden.double().requires_grad_()
    sums = []
    for start in range(0, len(hidden), 512):
        part = slice(start, start + 512)
        other = TaughtStates(teacher.hidden[part].double(), Head(teacher.head.weight.double()))
        found = reference_loss(leaf[part], Head(weight), other, targets[part], wanted)
        found.loss.backward()
        sums.append([value.detach() for value in found])
    return LossSums(*(torch.stack(values).sum() for values in zip(*sums, strict=True))), leaf.grad, weight.grad


@pytest.mark.parametrize("vocabulary", [32_000, 50_257])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_bf16_is_right_at_real_sizes(divergence: str, vocabulary: int) -> None:
    hidden, head, teacher, targets = problem(3000, 512, vocabulary)
    wanted = LossSettings(divergence, mixing=0.3, temperature=2.0)
    hidden.requires_grad_(), head.weight.requires_grad_()
    sums = distillation_loss(hidden, head, teacher, targets, wanted)
    sums.loss.backward()
    found = (*sums, hidden.grad, head.weight.grad)
    expected = exact(hidden.detach(), Head(head.weight.detach()), teacher, targets, wanted)
    for got, right in zip(found, (*expected[0], *expected[1:]), strict=True):
        assert ((got.double() - right).norm() / right.norm()).item() < 1e-2


def test_nothing_waits_for_the_device() -> None:
    hidden, head, teacher, targets = problem(5000, 256, 32_000)
    hidden.requires_grad_(), head.weight.requires_grad_()
    positions = torch.arange(0, 5000, 2, device="cuda")
    for _ in range(2):  # the first compiles
        loss = distillation_loss(hidden, head, teacher, targets[::2], LossSettings(), positions).loss
        loss.backward()
        torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


def test_memory_does_not_grow_with_the_tokens_times_the_vocabulary() -> None:
    peaks = []
    for tokens in (4096, 16_384):
        hidden, head, teacher, targets = problem(tokens, 512, 64_000)
        hidden.requires_grad_(), head.weight.requires_grad_()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        distillation_loss(hidden, head, teacher, targets, LossSettings()).loss.backward()
        peaks.append(torch.cuda.max_memory_allocated() - before)
        del hidden, head, teacher, targets
    assert peaks[1] - peaks[0] < 0.05 * 2 * (16_384 - 4096) * 64_000, "bytes of one bf16 copy of the logits"
