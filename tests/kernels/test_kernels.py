"""The fused losses against the reference in float64, and the reference against the definitions in numpy.

Both versions of a row's work are tested: PyTorch's, and Triton's (on the GPU if there is one, else in the interpreter).
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from processes import SUPPORT
from torch.nn import functional as F

from recyclable import kernels
from recyclable.kernels import (
    DIVERGENCES,
    Head,
    LossSettings,
    LossSums,
    Taught,
    TaughtLogits,
    TaughtStates,
    TaughtTopK,
    chunked,
    distillation_loss,
    reference_loss,
    rows,
)

triton = pytest.importorskip("triton")
from recyclable.kernels import fused  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS = {"torch": rows.row_gradient, "triton": fused.row_gradient}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks, several blocks of rows and of vocabulary, even for a handful of tokens."""
    monkeypatch.setattr(chunked, "GPU_TOKENS", 4)
    monkeypatch.setattr(chunked, "CPU_TOKENS", 4)
    monkeypatch.setattr(chunked, "CPU_LOGITS", 1)
    monkeypatch.setattr(chunked, "VOCABULARY_BLOCK", 32)
    monkeypatch.setattr(rows, "BLOCK", 200)
    monkeypatch.setattr(rows, "SHARED_BLOCK", 200)
    monkeypatch.setattr(fused, "BLOCK", 32)


@dataclass
class Problem:
    """Inputs of a loss, drawn in float64 and rounded to `dtype`."""

    tokens: int = 6
    hidden: int = 12
    teacher_hidden: int = 20
    vocabulary: int = 75
    teacher_vocabulary: int = 75
    kind: str = "online"
    k: int = 6
    dtype: torch.dtype = torch.float32
    largest: float = 30.0
    bias: bool = False
    student_scale: float = 1.0
    teacher_scale: float = 1.0
    student_cap: float | None = None
    teacher_cap: float | None = None
    ignored: float = 0.2
    train_head: bool = True
    train_hidden: bool = True
    seed: int = 0

    def make(self) -> tuple[torch.Tensor, Head, Taught | None, torch.Tensor]:
        """Hidden states, head, teacher, targets; the largest logit before cap and scale is about `largest`."""
        random = torch.Generator().manual_seed(self.seed)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=random, dtype=torch.float64)

        def head(vocabulary: int, hidden: torch.Tensor, scale: float, cap: float | None) -> Head:
            weight = draw(vocabulary, hidden.shape[1])
            if hidden.numel():
                weight *= self.largest / (hidden @ weight.T).abs().max()
            bias = self._round(draw(vocabulary)) if self.bias else None
            return Head(self._round(weight), bias, scale, cap)

        hidden, teacher_hidden = draw(self.tokens, self.hidden), draw(self.tokens, self.teacher_hidden)
        student = head(self.vocabulary, hidden, self.student_scale, self.student_cap)
        targets = torch.randint(self.vocabulary, (self.tokens,), generator=random)
        targets[torch.rand(self.tokens, generator=random) < self.ignored] = -100
        teacher: Taught | None = None
        if self.kind == "online":
            made = head(self.teacher_vocabulary, teacher_hidden, self.teacher_scale, self.teacher_cap)
            teacher = TaughtStates(self._round(teacher_hidden), made)
        elif self.kind == "dense":
            logits = draw(self.tokens, self.teacher_vocabulary) * self.largest / 4
            logits[torch.rand(logits.shape, generator=random) < 0.1] = -math.inf
            teacher = TaughtLogits(self._round(logits))
        elif self.kind == "top-k":
            order = torch.rand(self.tokens, self.teacher_vocabulary, generator=random).argsort(-1)
            k = min(self.k, self.teacher_vocabulary)
            values = self._round(draw(self.tokens, k) * self.largest / 4)
            teacher = TaughtTopK(values, order[:, :k].to(DEVICE), self.teacher_vocabulary)
        return self._round(hidden), student, teacher, targets.to(DEVICE)

    def _round(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(DEVICE, self.dtype)


def converted(part: object, dtype: torch.dtype) -> object:
    """A copy of a head or a teacher in another dtype."""
    if isinstance(part, torch.Tensor):
        return part.to(dtype) if part.is_floating_point() else part
    if isinstance(part, (Head, TaughtStates, TaughtLogits, TaughtTopK)):
        return replace(part, **{name: converted(value, dtype) for name, value in vars(part).items()})
    return part


def outcome(loss: Callable[..., LossSums], problem: Problem, dtype: torch.dtype, *given: object) -> list[torch.Tensor]:
    """Losses and the gradients of hidden states, weight and bias; inputs were rounded to the problem's dtype."""
    hidden, head, teacher, targets = problem.make()
    hidden = hidden.to(dtype).clone().requires_grad_(problem.train_hidden)
    head = converted(head, dtype)
    leaves = [hidden, head.weight, head.bias]
    for leaf in leaves[1:]:
        if leaf is not None:
            leaf.requires_grad_(problem.train_head)
    sums = loss(hidden, head, converted(teacher, dtype), targets, *given)
    assert not sums.hard.requires_grad and not sums.soft.requires_grad
    if sums.loss.requires_grad:
        (0.37 * sums.loss).backward()  # an upstream gradient that is not 1
    gradients = [leaf.grad for leaf in leaves if leaf is not None and leaf.grad is not None]
    return [sums.loss.detach(), sums.hard, sums.soft, *gradients]


def compare(problem: Problem, wanted: LossSettings, how: str) -> None:
    """Norm-wise relative error of every loss and gradient within the tolerance; near zero, absolute."""
    exact = outcome(reference_loss, problem, torch.float64, wanted)
    got = outcome(chunked.chunked_loss, problem, problem.dtype, wanted, None, ROWS[how])
    assert len(got) == len(exact)
    for found, expected, floor in zip(got, exact, [1, 1, 1, 0.01, 0.01, 0.01], strict=False):
        assert found.isfinite().all() and found.shape == expected.shape
        error, size = (found.double() - expected).norm().item(), expected.norm().item()
        assert error <= TOLERANCE[problem.dtype] * max(size, floor), (error, size)
    assert {tensor.dtype for tensor in got[:3]} == {torch.float32}
    assert {tensor.dtype for tensor in got[3:]} <= {problem.dtype}


# The reference, against the definitions.


def probabilities(logits: np.ndarray, temperature: float) -> np.ndarray:
    raised = np.exp(logits / temperature - (logits / temperature).max())
    return raised / raised.sum()


def kl(a: np.ndarray, b: np.ndarray) -> float:
    """Token by token, 0 log 0 = 0; a is conditioned on the tokens of b."""
    a = np.where(b > 0, a, 0) / a[b > 0].sum()
    return sum(x * math.log(x / y) for x, y in zip(a, b, strict=True) if x > 0)


@pytest.mark.parametrize(("student_size", "teacher_size"), [(11, 11), (11, 8), (8, 11)])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_reference_is_the_definition(divergence: str, student_size: int, teacher_size: int) -> None:
    problem = Problem(
        vocabulary=student_size,
        teacher_vocabulary=teacher_size,
        bias=True,
        student_scale=0.7,
        student_cap=9.0,
        teacher_cap=7.0,
    )
    wanted = LossSettings(divergence, mixing=0.3, temperature=3.0, hard_weight=0.6, soft_weight=0.4)
    hidden, head, teacher, targets = problem.make()
    got = reference_loss(*(converted(part, torch.float64) for part in (hidden, head, teacher)), targets, wanted)

    def logits(states: torch.Tensor, part: Head) -> np.ndarray:
        states, weight, bias = (x.double().cpu().numpy() for x in (states, part.weight, part.bias))
        raw = part.scale * (states @ weight.T + bias)
        return part.softcap * np.tanh(raw / part.softcap)

    hard = soft = 0.0
    union = max(student_size, teacher_size)
    for s, t, target in zip(logits(hidden, head), logits(teacher.hidden, teacher.head), targets.tolist(), strict=True):
        if target == -100:
            continue
        hard -= math.log(probabilities(s, 1.0)[target])
        q, p = (np.pad(probabilities(z, 3.0), (0, union - len(z))) for z in (s, t))
        m = 0.3 * p + 0.7 * q
        mixed = 0.3 * kl(p, m) + 0.7 * kl(q, m)
        soft += {"forward": kl(p, q), "reverse": kl(q, p), "jensen_shannon": mixed}[divergence]
    assert got.hard.item() == pytest.approx(hard, rel=1e-9)
    assert got.soft.item() == pytest.approx(soft, rel=1e-9)
    assert got.loss.item() == pytest.approx(0.6 * hard + 0.4 * 9 * soft, rel=1e-9)


def test_jensen_shannon_tends_to_the_two_divergences() -> None:
    hidden, head, teacher, targets = (converted(part, torch.float64) for part in Problem(largest=3.0).make())

    def soft(divergence: str, mixing: float = 0.5) -> float:
        return reference_loss(hidden, head, teacher, targets, LossSettings(divergence, mixing)).soft.item()

    assert soft("jensen_shannon", 1e-6) / 1e-6 == pytest.approx(soft("forward"), rel=1e-4)
    assert soft("jensen_shannon", 1 - 1e-6) / 1e-6 == pytest.approx(soft("reverse"), rel=1e-4)


# Both versions, against the reference.

VARIANTS = {
    "plain": Problem(),
    "capped, scaled, biased": Problem(
        bias=True, student_scale=1.7, teacher_scale=0.4, student_cap=20.0, teacher_cap=15.0
    ),
    "student lacks tokens": Problem(vocabulary=61, teacher_vocabulary=75, teacher_cap=12.0, bias=True),
    "teacher lacks tokens": Problem(vocabulary=75, teacher_vocabulary=61, bias=True),
    "dense": Problem(kind="dense"),
    "dense, teacher lacks tokens": Problem(kind="dense", teacher_vocabulary=40),
    "dense, student lacks tokens": Problem(kind="dense", vocabulary=40),
    "top-k": Problem(kind="top-k"),
    "top-k, mostly lacking": Problem(kind="top-k", vocabulary=12, teacher_vocabulary=90, k=4, ignored=0.0),
    "no teacher": Problem(kind="none", bias=True, student_cap=30.0),
}


FP32, BF16 = torch.float32, torch.bfloat16


@pytest.mark.parametrize(
    ("how", "dtype"),
    # Without a GPU a row's logits are fp32 whatever the inputs: the interpreter would see nothing new.
    [("torch", FP32), ("torch", BF16), ("triton", FP32), *([("triton", BF16)] if DEVICE == "cuda" else [])],
    ids=lambda value: str(value).removeprefix("torch."),
)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_losses_and_gradients_are_the_references(how: str, dtype: torch.dtype, variant: str, divergence: str) -> None:
    wanted = LossSettings(divergence, mixing=0.3, temperature=2.5, hard_weight=0.6, soft_weight=0.8)
    compare(replace(VARIANTS[variant], dtype=dtype), wanted, how)


@pytest.mark.parametrize("how", ROWS)
@pytest.mark.parametrize("tokens", [0, 1])
@pytest.mark.parametrize("ignored", [0.0, 1.1])
def test_no_token_one_token_and_no_valid_token(how: str, tokens: int, ignored: float) -> None:
    problem = Problem(tokens=tokens, ignored=ignored, bias=True)
    compare(problem, LossSettings("reverse"), how)
    if ignored > 1 or not tokens:
        got = outcome(chunked.chunked_loss, problem, torch.float32, LossSettings(), None, ROWS[how])
        assert len(got) == 6 and not any(tensor.any() for tensor in got), "nothing to learn: zeros, not NaN"


@pytest.mark.parametrize("how", ROWS)
def test_without_targets_every_token_counts_in_the_divergence_alone(how: str) -> None:
    hidden, head, teacher, _ = Problem().make()
    sums = chunked.chunked_loss(hidden, head, teacher, None, LossSettings(), None, ROWS[how])
    exact = reference_loss(hidden, head, teacher, None, LossSettings())
    assert sums.hard.item() == 0 and sums.soft.item() == pytest.approx(exact.soft.item(), rel=1e-5)


def test_the_mean_loss_of_bf16_states_and_head_on_a_cpu_is_that_of_the_same_numbers_in_fp32() -> None:
    problem = Problem(tokens=64, hidden=64, vocabulary=8192, kind="none", largest=8.0, dtype=BF16, ignored=0.0)
    hidden, head, _, targets = problem.make()

    def mean_loss(dtype: torch.dtype) -> float:
        states, weight = (tensor.to("cpu", dtype) for tensor in (hidden, head.weight))
        return distillation_loss(states, Head(weight), None, targets.cpu(), LossSettings()).loss.item() / len(targets)

    assert mean_loss(BF16) == pytest.approx(mean_loss(FP32), rel=0, abs=1e-4)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_shape_in_pytorch(data: st.DataObject) -> None:
    compare(*drawn(data), "torch")


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_shape_in_triton(data: st.DataObject) -> None:
    compare(*drawn(data), "triton")


def drawn(data: st.DataObject) -> tuple[Problem, LossSettings]:
    caps = st.none() | st.floats(1, 50)
    problem = Problem(
        tokens=data.draw(st.integers(0, 11)),
        hidden=data.draw(st.integers(1, 20)),
        teacher_hidden=data.draw(st.integers(1, 20)),
        vocabulary=data.draw(st.integers(1, 130)),
        teacher_vocabulary=data.draw(st.integers(1, 130)),
        kind=data.draw(st.sampled_from(["online", "dense", "top-k", "none"])),
        k=data.draw(st.integers(1, 8)),
        dtype=data.draw(st.sampled_from([torch.float32, torch.bfloat16])),
        largest=data.draw(st.floats(0.01, 30)),
        bias=data.draw(st.booleans()),
        student_cap=data.draw(caps),
        teacher_cap=data.draw(caps),
        ignored=data.draw(st.sampled_from([0.0, 0.3, 1.1])),
        seed=data.draw(st.integers(0, 1000)),
    )
    wanted = LossSettings(
        data.draw(st.sampled_from(DIVERGENCES)),
        mixing=data.draw(st.floats(0.05, 0.95)),
        temperature=data.draw(st.floats(0.5, 20)),
        hard_weight=data.draw(st.floats(0, 1)),
        soft_weight=data.draw(st.floats(0, 1)),
    )
    return problem, wanted


def by_torch(hidden: torch.Tensor, head: Head, teacher: TaughtLogits, targets: torch.Tensor, wanted: LossSettings):
    """The loss as it is usually written, in the dtype of its inputs."""
    student = hidden @ head.weight.T
    log_q, log_p = ((z / wanted.temperature).log_softmax(-1) for z in (student, teacher.logits))
    if wanted.divergence == "forward":
        soft = F.kl_div(log_q, log_p, reduction="sum", log_target=True)
    elif wanted.divergence == "reverse":
        soft = F.kl_div(log_p, log_q, reduction="sum", log_target=True)
    else:
        beta = wanted.mixing
        log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
        soft = beta * F.kl_div(log_m, log_p, reduction="sum", log_target=True)
        soft = soft + (1 - beta) * F.kl_div(log_m, log_q, reduction="sum", log_target=True)
    hard = F.cross_entropy(student, targets, reduction="sum")
    loss = wanted.hard_weight * hard + wanted.soft_weight * wanted.temperature**2 * soft
    return LossSums(loss, hard.detach(), soft.detach())


@pytest.mark.parametrize("largest", [100.0, 1e3, 1e4])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("how", ROWS)
def test_huge_logits_are_finite_and_no_worse_than_torch(
    how: str, divergence: str, temperature: float, largest: float
) -> None:
    """The head is the identity, so that the products are exact and only the loss errs."""
    random = torch.Generator().manual_seed(1)
    student, teacher = (torch.randn(6, 50, generator=random).to(DEVICE) * largest / 3 for _ in range(2))
    targets = torch.randint(50, (6,), generator=random).to(DEVICE)
    wanted = LossSettings(divergence, 0.4, temperature)

    def run(loss: Callable[..., LossSums], dtype: torch.dtype, *more: object) -> list[torch.Tensor]:
        leaf = student.to(dtype).clone().requires_grad_()
        head = Head(torch.eye(50, dtype=dtype, device=DEVICE))
        sums = loss(leaf, head, TaughtLogits(teacher.to(dtype)), targets, wanted, *more)
        sums.loss.backward()
        return [sums.loss.detach(), sums.hard, sums.soft, leaf.grad]

    exact = run(by_torch, torch.float64)
    usual = run(by_torch, torch.float32)
    got = run(chunked.chunked_loss, torch.float32, None, ROWS[how])
    for found, peer, expected in zip(got, usual, exact, strict=True):
        error, allowed = ((x.double() - expected).norm().item() for x in (found, peer))
        one_rounding = 2**-23 * expected.norm().item()
        assert found.isfinite().all() and error <= 2 * allowed + one_rounding


@pytest.mark.parametrize("how", ROWS)
def test_equal_distributions_have_no_divergence_and_no_gradient(how: str) -> None:
    hidden, head, _, targets = Problem(tokens=2).make()
    hidden.requires_grad_()
    for divergence in DIVERGENCES:
        wanted = LossSettings(divergence, hard_weight=0.0)
        teacher = TaughtStates(hidden.detach(), head)
        sums = chunked.chunked_loss(hidden, head, teacher, targets, wanted, None, ROWS[how])
        (gradient,) = torch.autograd.grad(sums.loss, hidden)
        assert abs(sums.soft.item()) < 1e-5 and gradient.norm() < 1e-4


# What a caller relies on.


@pytest.mark.parametrize("kind", ["dense", "top-k"])
def test_a_cached_teacher_teaches_what_the_online_one_does(kind: str) -> None:
    problem = Problem()
    hidden, head, online, targets = problem.make()
    logits = online.hidden @ online.head.weight.T
    everything = torch.arange(logits.shape[1], device=DEVICE).flip(0).expand_as(logits)
    cached = {
        "dense": TaughtLogits(logits.log_softmax(-1)),
        "top-k": TaughtTopK(logits.log_softmax(-1).flip(1), everything, logits.shape[1]),
    }[kind]
    for divergence in DIVERGENCES:
        wanted = LossSettings(divergence, temperature=3.0)
        sums = [distillation_loss(hidden, head, teacher, targets, wanted).soft.item() for teacher in (online, cached)]
        assert sums[1] == pytest.approx(sums[0], rel=1e-5)


def test_positions_select_from_student_and_online_teacher() -> None:
    hidden, head, teacher, targets = Problem(tokens=12).make()
    hidden.requires_grad_()
    positions = torch.tensor([7, 2, 11, 3], device=DEVICE)
    batched = TaughtStates(teacher.hidden.view(3, 4, -1), teacher.head)
    got = distillation_loss(hidden.view(3, 4, -1), head, batched, targets[positions], LossSettings(), positions)
    got.loss.backward()
    gradient, hidden.grad = hidden.grad, None
    taken = TaughtStates(teacher.hidden[positions], teacher.head)
    expected = reference_loss(hidden[positions], head, taken, targets[positions], LossSettings())
    expected.loss.backward()
    assert torch.allclose(got.loss, expected.loss, rtol=1e-5)
    assert torch.allclose(gradient, hidden.grad, atol=1e-4)
    assert set(gradient.any(1).nonzero().flatten().tolist()) <= set(positions.tolist())


def test_frozen_parts_get_no_gradient_and_cost_none(monkeypatch: pytest.MonkeyPatch) -> None:
    sums_of_weights = []
    monkeypatch.setattr(chunked, "accumulate", lambda *_: sums_of_weights.append(1))
    problem = Problem(train_head=False, bias=True)
    got = outcome(distillation_loss, problem, torch.float32, LossSettings())
    exact = outcome(reference_loss, problem, torch.float64, LossSettings())
    assert len(got) == len(exact) == 4 and not sums_of_weights
    assert torch.allclose(got[3].double(), exact[3], rtol=1e-4, atol=1e-5)
    only_head = outcome(distillation_loss, Problem(train_hidden=False), torch.float32, LossSettings())
    assert len(only_head) == 4 and only_head[3].shape == (75, 12)


def test_evaluation_computes_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "accumulate", None)
    hidden, head, teacher, targets = Problem().make()
    head.weight.requires_grad_()
    with torch.no_grad():
        got = distillation_loss(hidden, head, teacher, targets, LossSettings())
    assert not got.loss.requires_grad
    assert got.loss.item() == pytest.approx(reference_loss(hidden, head, teacher, targets, LossSettings()).loss.item())


def test_weight_gradients_of_many_chunks_do_not_lose_what_bf16_would() -> None:
    """512 equal tokens, two a chunk: summed in bf16, the gradient would stop growing at 256 addends."""
    hidden = torch.ones(512, 4, device=DEVICE, dtype=torch.bfloat16)
    weight = torch.zeros(3, 4, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.zeros(512, dtype=torch.long, device=DEVICE)
    chunked.GPU_TOKENS = chunked.CPU_TOKENS = 2
    distillation_loss(hidden, Head(weight), None, targets, LossSettings()).loss.backward()
    assert torch.allclose(weight.grad[0].float(), torch.tensor(-512 * 2 / 3, device=DEVICE), rtol=2**-8)


def test_autocast_computes_in_its_dtype_and_returns_gradients_in_the_parameters() -> None:
    problem = Problem(dtype=torch.float32, bias=True)
    hidden, head, teacher, targets = problem.make()
    hidden.requires_grad_(), head.weight.requires_grad_(), head.bias.requires_grad_()
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        got = distillation_loss(hidden, head, teacher, targets, LossSettings()).loss
    got.backward()
    exact = outcome(reference_loss, Problem(dtype=torch.bfloat16, bias=True), torch.float64, LossSettings())
    assert got.dtype == hidden.grad.dtype == head.weight.grad.dtype == head.bias.grad.dtype == torch.float32
    assert got.item() == pytest.approx(exact[0].item(), rel=0.02)
    assert ((head.weight.grad.double() * 0.37 - exact[4]).norm() / exact[4].norm()).item() < 0.05


@pytest.mark.parametrize("tokens", [3, 12])  # one chunk, whose gradient is a sum of one addend, and several
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_one_chunk_or_several_make_no_difference(tokens: int, dtype: torch.dtype) -> None:
    compare(Problem(tokens=tokens, dtype=dtype, bias=True, ignored=0.0), LossSettings(temperature=2.0), "torch")


def test_gradients_are_given_away_once() -> None:
    """They are scaled where they lie: a second pass would scale them twice."""
    hidden, head, teacher, targets = Problem().make()
    hidden.requires_grad_()
    loss = distillation_loss(hidden, head, teacher, targets, LossSettings()).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward pass"):
        loss.backward()


def test_second_derivatives_are_refused() -> None:
    hidden, head, teacher, targets = Problem().make()
    hidden.requires_grad_()
    loss = distillation_loss(hidden, head, teacher, targets, LossSettings()).loss
    (gradient,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable|does not require grad"):
        gradient.sum().backward()


@pytest.mark.parametrize("how", ROWS)
def test_gradients_in_bf16_are_written_beside_the_logits(how: str) -> None:
    """What cuBLAS gets: the rounded gradient, in memory of its own, with a row stride of its own."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(5, 70, generator=generator).to(DEVICE) * 5 for _ in range(2))
    targets = torch.randint(70, (5,), generator=generator).to(DEVICE)
    wanted = LossSettings("jensen_shannon", temperature=2.0)
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        gradient = torch.zeros(5, 80, dtype=dtype, device=DEVICE)
        logits = (chunked.Logits(z.clone(), None, 1.0, None) for z in (student, teacher))
        ROWS[how](*logits, targets, wanted, gradient[:, :70])
        assert not gradient[:, 70:].any()
        found.append(gradient[:, :70])
    assert torch.allclose(found[0], found[1].float(), rtol=2**-7, atol=0)  # the interpreter truncates
    leaf = student.double().requires_grad_()
    head, cached = Head(torch.eye(70, dtype=torch.float64, device=DEVICE)), TaughtLogits(teacher.double())
    reference_loss(leaf, head, cached, targets, wanted).loss.backward()
    assert torch.allclose(found[0].double(), leaf.grad, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"divergence": "kl"}, "divergence: 'kl', expected one of forward, reverse, jensen_shannon"),
        ({"mixing": 1.0}, "mixing: 1.0"),
        ({"temperature": 0.0}, "temperature: 0.0"),
    ],
)
def test_bad_settings_are_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LossSettings(**change)


def test_inputs_that_do_not_fit_are_named() -> None:
    hidden, head, teacher, targets = Problem().make()
    wanted = LossSettings()
    with pytest.raises(ValueError, match="gather it first"):
        distillation_loss(hidden, Head(hidden.new_empty(0)), teacher, targets, wanted)
    with pytest.raises(ValueError, match=r"targets: shape \[3\], expected \[6\]"):
        distillation_loss(hidden, head, teacher, targets[:3], wanted)
    with pytest.raises(ValueError, match="teacher: 4 tokens, expected 6"):
        distillation_loss(hidden, head, TaughtLogits(hidden.new_zeros(4, 75)), targets, wanted)
    with pytest.raises(ValueError, match="nothing to learn from"):
        distillation_loss(hidden, head, None, None, wanted)
    with pytest.raises(ValueError, match=r"head weight: torch\.float32, expected torch\.bfloat16"):
        distillation_loss(hidden.bfloat16(), head, teacher, targets, wanted)


def test_the_kernel_compiles_for_gpus_that_are_not_here(tmp_path: Path) -> None:
    """The interpreter accepts what the compiler may not."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, str(SUPPORT / "compile_kernels.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["80", "forward", "80", "jensen_shannon", "90", "forward", "90", "jensen_shannon"]


def test_the_dispatch_takes_triton_on_the_gpu_alone() -> None:
    taken = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "chunked_loss", lambda *given: taken.append(given[-1]))
        kernels.distillation_loss(*Problem().make(), LossSettings())
    assert taken == [fused.row_gradient if DEVICE == "cuda" else rows.row_gradient]


# Logits in 16 bits.


@pytest.mark.parametrize("how", ROWS)
@pytest.mark.parametrize("kind", ["none", "online", "dense", "top-k"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_logits_in_bf16_cost_their_rounding_and_no_more(divergence: str, kind: str, how: str) -> None:
    problem = Problem(
        kind=kind, dtype=torch.bfloat16, largest=4.0, bias=True, student_scale=0.8, student_cap=9.0, teacher_cap=7.0
    )
    wanted = LossSettings(divergence, mixing=0.3, temperature=2.0, hard_weight=0.6, soft_weight=0.4, logits="bf16")
    exact = outcome(reference_loss, problem, torch.float64, wanted)
    got = outcome(chunked.chunked_loss, problem, problem.dtype, wanted, None, ROWS[how])
    assert len(got) == len(exact)
    for found, expected in zip(got, exact, strict=True):
        error, size = (found.double() - expected).norm().item(), expected.norm().item()
        assert error <= 2e-2 * max(size, 0.1), (error, size)
    assert {tensor.dtype for tensor in got[:3]} == {torch.float32}


def held(wanted: LossSettings, dtype: torch.dtype) -> int:
    """Bytes of a chunk's logits of one token, of both models, and of their gradient."""
    problem, found = Problem(dtype=dtype), set()

    def rows_of(*given: object) -> tuple[torch.Tensor, torch.Tensor]:
        student, teacher, *_, gradient = given
        tensors = {t.data_ptr(): t.element_size() for t in (student.products, teacher.products, gradient)}
        found.add(sum(tensors.values()))
        return rows.row_gradient(*given)

    outcome(chunked.chunked_loss, problem, dtype, wanted, None, rows_of)
    (one,) = found
    return one


def test_logits_in_bf16_take_less_than_half_and_gradients_their_place() -> None:
    assert held(LossSettings(), torch.bfloat16) == 4 + 4 + 2
    assert held(LossSettings(logits="bf16"), torch.bfloat16) == 2 + 2


@pytest.mark.parametrize("how", ROWS)
def test_logits_of_fp32_states_stay_in_fp32(how: str) -> None:
    plain, asked = (
        outcome(chunked.chunked_loss, Problem(), torch.float32, LossSettings(logits=logits), None, ROWS[how])
        for logits in ("fp32", "bf16")
    )
    assert all(torch.equal(a, b) for a, b in zip(plain, asked, strict=True))


def test_other_precisions_of_logits_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^logits: 'fp8', expected one of fp32, bf16$"):
        LossSettings(logits="fp8")
