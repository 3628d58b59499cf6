"""Answers in text along a path: the loss and its gradient are those of whole mixed state dicts in plain PyTorch."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from causal_models import gemma2, gpt2, llama, responses
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.func import functional_call

from recyclable.objectives.interpolation import Places
from recyclable.objectives.token_distillation import TokenTeacher
from recyclable.objectives.token_interpolation import TokenInterpolation
from recyclable.objectives.token_states import Compared

SHARE, TEMPERATURE, POINTS = 0.3, 2.0, (0.25, 0.6)
ALPHAS, BETAS = (0.5, 0.8, 0.6), (1.0, 2.0, 3.0)
FAMILIES = {"gpt2": gpt2, "llama": llama, "llama tied": partial(llama, tied=True), "gemma2": gemma2}


def tokens_of(model: nn.Module, weights: dict[str, torch.Tensor], data: Any, labels: torch.Tensor) -> Any:
    """Logits [M, V] and states of the tokens that predict, row by row [..., N, H]."""
    inputs = {name: data[name] for name in ("input_ids", "attention_mask")}
    told = functional_call(model, weights, kwargs={**inputs, "output_hidden_states": True, "use_cache": False})
    predicting = labels.roll(-1, 1) != -100
    states = torch.stack(told.hidden_states[:-1], dim=2)
    return told.logits[predicting], [
        states[row, predicting[row]] for row in range(len(labels)) if predicting[row].any()
    ]


def oracle(student: nn.Module, fixed: list[nn.Module], data: Any, labels: torch.Tensor) -> torch.Tensor:
    own = dict(student.named_parameters())
    ends = [{name: p.detach() for name, p in model.named_parameters()} for model in fixed]
    with torch.no_grad():
        teacher, taught = tokens_of(student, ends[0], data, labels)
    p = (teacher / TEMPERATURE).softmax(-1)
    places = [(1.0, 0), *((x, end) for end in range(len(ends)) for x in POINTS)]
    loss = torch.zeros(())
    for x, end in places:
        mixed = {name: x * value + (1 - x) * ends[end][name] for name, value in own.items()}
        logits, states = tokens_of(student, mixed, data, labels)
        which = 2 if x == 1.0 else POINTS.index(x)
        kl = (p * (p.log() - (logits / TEMPERATURE).log_softmax(-1))).sum(-1).mean()
        patient = torch.stack([0.5 * nn.functional.mse_loss(a, b) for a, b in zip(states, taught, strict=True)]).mean()
        loss = loss + (1 - SHARE) * (ALPHAS[which] * TEMPERATURE**2 * kl + BETAS[which] * patient)
        if x == 1.0:
            loss = loss + SHARE * nn.functional.cross_entropy(logits, data["targets"])
    return loss


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("fixed", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradient_are_those_of_whole_mixed_models(family: str, fixed: int, lora: bool) -> None:
    torch.manual_seed(0)
    models = [FAMILIES[family]().eval() for _ in range(1 + fixed)]
    if lora:
        models = [get_peft_model(model, LoraConfig(r=2, target_modules="all-linear")) for model in models]
        for model in models:
            for name, parameter in model.named_parameters():
                parameter.data += 0.1 * torch.randn_like(parameter) * ("lora_" in name)
    student, *others = models
    data, labels = responses()
    wanted = oracle(student, others, data, labels)
    wanted.backward()
    gradients = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    student.zero_grad()

    made = TokenInterpolation(
        student,
        TokenTeacher(others[0], Compared(first=False)),
        places=Places(POINTS),
        share=SHARE,
        alphas=ALPHAS,
        betas=BETAS,
        temperature=TEMPERATURE,
        second=others[1] if fixed == 2 else None,
    ).eval()
    counts, total = made.counts(data), 0.0
    assert counts["kd_2"] == 8 and counts["patient_2"] == 2
    for of_pass in made.passes(0):
        sums = made(data, **of_pass)
        loss = sum(made.weights[term] * value / counts[term] for term, value in sums.items())
        loss.backward()
        total += loss.item()
    assert total == pytest.approx(wanted.item(), rel=1e-5)
    found = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert torch.allclose(found[name], gradient, rtol=1e-4, atol=1e-5), name


def test_a_batch_without_a_token_to_predict_teaches_nothing() -> None:
    student, teacher = llama(), llama()
    data, _ = responses()
    data["positions"], data["targets"] = data["positions"][:0], data["targets"][:0]
    made = TokenInterpolation(
        student,
        TokenTeacher(teacher, Compared(first=False)),
        places=Places(POINTS),
        share=SHARE,
        alphas=ALPHAS,
        betas=BETAS,
        temperature=TEMPERATURE,
    )
    assert set(made.counts(data).values()) == {0}
    for of_pass in made.passes(0):
        sums = made(data, **of_pass)
        assert all(value.item() == 0 for value in sums.values())
        sum(sums.values()).backward()
    assert all(p.grad is None or not p.grad.any() for p in student.parameters())
