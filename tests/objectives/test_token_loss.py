"""The loss of chosen tokens is the one that transformers computes over whole sequences."""

from __future__ import annotations

import pytest
import torch
from causal_models import gemma2, gpt2, llama, responses
from masked_models import batch, bert, distilbert, roberta

from recyclable.objectives.token_distillation import TokenDistillation, TokenTeacher
from recyclable.objectives.token_loss import TokenLoss
from recyclable.objectives.token_states import Compared


@pytest.mark.parametrize("family", [bert, roberta, distilbert])
def test_loss_and_gradients_are_those_of_transformers(family) -> None:
    torch.manual_seed(0)
    model = family().eval()
    data, labels = batch()
    inputs = {name: data[name] for name in ("input_ids", "attention_mask")}

    made = TokenLoss(model, "mlm")
    assert made.counts(data) == {"mlm": int((labels != -100).sum())}
    got = made(data)["mlm"] / made.counts(data)["mlm"]
    got.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    wanted = model(**inputs, labels=labels).loss
    wanted.backward()
    assert got.item() == pytest.approx(wanted.item(), rel=1e-6)
    assert got.item() > 1
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, found[name], atol=1e-6), name


def test_a_batch_without_a_masked_token_costs_nothing() -> None:
    data, _ = batch(masked=0.0)
    made = TokenLoss(bert().eval(), "mlm")
    assert made.counts(data) == {"mlm": 0}
    assert made(data)["mlm"].item() == 0


@pytest.mark.parametrize("family", [gpt2, llama, gemma2])
def test_the_loss_of_responses_and_its_gradients_are_those_of_transformers(family) -> None:
    torch.manual_seed(0)
    model = family().eval()
    data, labels = responses()
    made = TokenLoss(model)
    (made(data)["task"] / made.counts(data)["task"]).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    wanted = model(input_ids=data["input_ids"], attention_mask=data["attention_mask"], labels=labels).loss
    wanted.backward()
    assert made(data)["task"].item() / 8 == pytest.approx(wanted.item(), rel=1e-6)
    assert gradients.keys() == {name for name, p in model.named_parameters() if p.grad is not None}
    for name, parameter in model.named_parameters():
        assert torch.allclose(gradients[name], parameter.grad, atol=2e-6), name


@pytest.mark.parametrize("family", [gpt2, llama, gemma2])
def test_predictions_are_each_rows_likelihood_and_length(family) -> None:
    torch.manual_seed(0)
    model = family().eval()
    data, labels = responses()
    found = TokenLoss(model)(data, predict=True)
    logits = model(input_ids=data["input_ids"], attention_mask=data["attention_mask"]).logits[:, :-1]
    wanted = labels[:, 1:]
    told = logits.log_softmax(-1).gather(-1, wanted.clamp(min=0)[..., None]).squeeze(-1) * (wanted != -100)
    assert torch.allclose(found[:, 0], told.sum(1), atol=1e-5)
    assert found[:, 1].tolist() == [3, 5, 0]
    assert found[2].tolist() == [0, 0]


def test_a_decoders_patient_loss_compares_the_predicting_tokens_row_by_row() -> None:
    torch.manual_seed(0)
    student, teacher = llama().eval(), llama().eval()
    data, labels = responses()
    made = TokenDistillation(
        student, TokenTeacher(teacher, Compared(first=False)), alpha=0.5, beta=2.0, temperature=3.0
    )
    inputs = {name: data[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        sums = made(data)
        one, other = (model(**inputs, output_hidden_states=True) for model in (student, teacher))
    total = 0.0
    for row in range(2):  # the third has no response
        places = (labels[row] != -100).nonzero().squeeze(1) - 1
        pairs = zip(one.hidden_states[:-1], other.hidden_states[:-1], strict=True)
        total += (
            sum(0.5 * (a[row, places] - b[row, places]).square().mean() for a, b in pairs) / 2
        )  # two layers' inputs
    assert made.counts(data)["patient"] == 2
    assert sums["patient"].item() == pytest.approx(total.item(), rel=1e-5)
    p, q = ((out.logits[labels.roll(-1, 1) != -100] / 3.0).softmax(-1) for out in (other, one))
    assert sums["kd"].item() == pytest.approx((p * (p / q).log()).sum().item(), rel=1e-5)
