"""Distillation against the formulae written out in numpy, and a teacher that only teaches."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from decoders import END, PAD, SEQ2SEQ, decoder, decoder_config, decoder_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification

from recyclable.objectives.distillation import Distillation, patient_sum
from recyclable.objectives.teachers import OnlineTeacher, compared_states
from recyclable.tasks.classification import Classification
from recyclable.tasks.regression import Regression

CLASSES, NUMBERS = Classification(), Regression()
RANDOM = np.random.default_rng(0)


def model(seed: int, labels: int = 3, dropout: float = 0.0) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=30,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        num_labels=labels,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        initializer_range=0.5,
    )
    return BertForSequenceClassification(config)


def batch(labels: int = 3, examples: int = 5) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(examples, 8, dtype=torch.long)
    mask[0, 5:] = 0
    wanted = (
        torch.randint(labels, (examples,), generator=generator)
        if labels > 1
        else torch.randn(examples, generator=generator)
    )
    ids = torch.randint(5, 30, (examples, 8), generator=generator)
    return {"input_ids": ids, "attention_mask": mask, "labels": wanted}


def objective(student, teacher, **settings) -> Distillation:
    kind = NUMBERS if student.config.num_labels == 1 else CLASSES
    settings = {"alpha": 0.7, "beta": 10.0, "temperature": 5.0, **settings}
    return Distillation(student, kind, OnlineTeacher(teacher, kind, with_states=settings["beta"] > 0), **settings)


def loss(made: Distillation, data: dict[str, torch.Tensor]) -> torch.Tensor:
    sums, counts = made(data), made.counts(data)
    return sum(made.weights[term] * sums[term] / counts[term] for term in made.weights)


def softmax(logits: np.ndarray) -> np.ndarray:
    raised = np.exp(logits)
    return raised / raised.sum(1, keepdims=True)


def kl(student: np.ndarray, teacher: np.ndarray, temperature: float) -> np.ndarray:
    """Per example, from the definition."""
    p, q = softmax(teacher / temperature), softmax(student / temperature)
    return (p * np.log(p / q)).sum(1)


def patient(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """The patient loss of hidden states as a model returns them, [layers + 1, B, L, H]."""
    each = (SimpleNamespace(hidden_states=tuple(states)) for states in (student, teacher))
    return patient_sum(*(compared_states(told, {}, BertConfig()) for told in each))


@pytest.mark.parametrize("temperature", [1.0, 5.0, 0.5])
def test_kd_is_the_divergence_of_the_student_from_the_teacher(temperature: float) -> None:
    student, teacher = RANDOM.normal(size=(2, 7, 4)) * 3
    got = CLASSES.divergence_sum(torch.tensor(student), torch.tensor(teacher), temperature)
    assert got.dtype == torch.float32
    assert got.item() == pytest.approx(kl(student, teacher, temperature).sum(), rel=1e-5)
    other_way = kl(teacher, student, temperature).sum()
    assert abs(got.item() - other_way) > 0.01 * abs(other_way)


def test_kd_is_zero_only_for_equal_distributions() -> None:
    logits = torch.tensor(RANDOM.normal(size=(4, 3)))
    assert CLASSES.divergence_sum(logits, logits + 7, 5.0).item() == pytest.approx(0, abs=1e-6)
    assert CLASSES.divergence_sum(logits, -logits, 5.0).item() > 0.01


def test_a_teacher_known_by_its_likeliest_classes_gives_the_others_no_probability() -> None:
    student, teacher = np.random.default_rng(1).normal(size=(2, 6, 5)) * 3
    kept = np.argsort(-teacher, axis=1)[:, :2]
    p = softmax(np.take_along_axis(teacher, kept, 1) / 2)
    q = np.take_along_axis(softmax(student / 2), kept, 1)
    logits, classes = torch.tensor(teacher).topk(2)
    got = CLASSES.divergence_sum(torch.tensor(student), logits, 2.0, classes).item()
    assert got == pytest.approx((p * np.log(p / q)).sum(), rel=1e-5)
    logits, classes = torch.tensor(teacher).topk(5)
    dense = CLASSES.divergence_sum(torch.tensor(student), torch.tensor(teacher), 2.0).item()
    assert CLASSES.divergence_sum(torch.tensor(student), logits, 2.0, classes).item() == pytest.approx(dense, rel=1e-5)


def test_kd_of_one_output_is_half_the_squared_distance() -> None:
    student, teacher = RANDOM.normal(size=(2, 6, 1))
    got = NUMBERS.divergence_sum(torch.tensor(student), torch.tensor(teacher), 5.0).item()
    assert got == pytest.approx(sum((s - t) ** 2 / 2 for s, t in zip(student[:, 0], teacher[:, 0], strict=True)) / 25)


def test_half_precision_logits_and_states_are_compared_in_fp32() -> None:
    student, teacher = torch.tensor(RANDOM.normal(size=(2, 5, 4)) * 4).bfloat16()
    wanted = kl(student.double().numpy(), teacher.double().numpy(), 2.0).sum()
    assert CLASSES.divergence_sum(student, teacher, 2.0).item() == pytest.approx(wanted, rel=1e-5)
    states = [torch.tensor(RANDOM.normal(size=(2, 3, 8)) * 100).half() for _ in range(2)]
    assert torch.isfinite(patient_sum(*states)) and patient_sum(*states).dtype == torch.float32


def test_patient_loss_is_half_the_mse_of_first_tokens_without_the_last_layer() -> None:
    student, teacher = RANDOM.normal(size=(2, 4, 5, 6, 8))  # embeddings and 3 layers, batch 5, length 6, width 8
    got = patient(torch.tensor(student), torch.tensor(teacher))
    difference = (student - teacher)[:3, :, 0, :]
    assert got.item() / 5 == pytest.approx(0.5 * (difference**2).mean(), rel=1e-5)


# Rounded inputs -> the norm-wise relative error that a loss and its gradient may have.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def error(found: torch.Tensor, exact: torch.Tensor, floor: float = 1.0) -> float:
    """Norm-wise, relative; below `floor` as if it were that large."""
    assert found.isfinite().all()
    return ((found.double() - exact).norm() / max(exact.norm(), floor)).item()


def value_and_gradient(loss, student: torch.Tensor, *others: object) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = student.clone().requires_grad_()
    value = loss(leaf, *others)
    (0.37 * value).backward()  # an upstream gradient that is not 1
    return value.detach(), leaf.grad


@pytest.mark.parametrize("dtype", TOLERANCE)
@given(shape=st.tuples(st.integers(0, 9), st.integers(1, 7), st.integers(1, 70)), seed=st.integers(0, 1000))
def test_patient_loss_and_gradient_are_those_of_float64_on_the_same_inputs(dtype, shape, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(shape, generator=random, dtype=torch.float64).mul(9).to(dtype) for _ in range(2))
    value, gradient = value_and_gradient(patient_sum, student, teacher)
    difference = student.double() - teacher.double()
    each = shape[1] * shape[2]
    assert error(value, (difference**2).sum() / 2 / each) <= TOLERANCE[dtype]
    assert error(gradient * each, 0.37 * difference, 0.01) <= TOLERANCE[dtype] and gradient.dtype == dtype


def exact_kd(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """KL and its gradient from the definitions, in float64."""
    student, teacher = (z.double() / temperature for z in (student, teacher))
    log_q, log_p = (z - z.logsumexp(-1, keepdim=True) for z in (student, teacher))
    return (log_p.exp() * (log_p - log_q)).sum(), (log_q.exp() - log_p.exp()) * (0.37 / temperature)


@pytest.mark.parametrize("dtype", TOLERANCE)
@given(
    shape=st.tuples(st.integers(0, 9), st.integers(2, 40)),
    temperature=st.floats(0.5, 20),
    largest=st.floats(0.01, 30),
    seed=st.integers(0, 1000),
)
def test_kd_and_its_gradient_are_those_of_float64_on_the_same_inputs(
    dtype, shape, temperature: float, largest: float, seed: int
) -> None:
    random = torch.Generator().manual_seed(seed)
    student, teacher = ((torch.rand(shape, generator=random) * 2 - 1).mul(largest).to(dtype) for _ in range(2))
    value, gradient = value_and_gradient(CLASSES.divergence_sum, student, teacher, temperature)
    exact_value, exact_gradient = exact_kd(student, teacher, temperature)
    assert error(value, exact_value) <= TOLERANCE[dtype]
    assert error(gradient, exact_gradient, 0.01) <= TOLERANCE[dtype]


@pytest.mark.parametrize("largest", [100.0, 1e3, 1e4])
def test_kd_of_huge_logits_is_finite_and_near_float64(largest: float) -> None:
    student, teacher = (torch.randn(6, 5, generator=torch.Generator().manual_seed(s)) * largest / 3 for s in (1, 2))
    value, gradient = value_and_gradient(CLASSES.divergence_sum, student, teacher, 4.0)
    exact_value, exact_gradient = exact_kd(student, teacher, 4.0)
    assert error(value, exact_value) <= 1e-5 and error(gradient, exact_gradient) <= 1e-4


def test_patient_loss_sees_neither_other_tokens_nor_the_last_layer() -> None:
    student = torch.tensor(RANDOM.normal(size=(4, 5, 6, 8)))
    teacher = student.clone()
    teacher[:, :, 1:] += 1
    teacher[-1] += 1
    assert patient(student, teacher).item() == 0
    teacher[0, :, 0] += 1  # the embedding output counts
    assert patient(student, teacher).item() == pytest.approx(5 * 0.5 / 3, rel=1e-5)


@pytest.mark.parametrize("reduction", ["batchmean", "paper"])
def test_the_loss_is_the_weighted_sum_of_the_formula(reduction: str) -> None:
    student, teacher, data = model(1), model(2), batch()
    made = objective(student, teacher, alpha=0.6, beta=3.0, temperature=4.0, reduction=reduction).eval()
    with torch.no_grad():
        inputs = {k: v for k, v in data.items() if k != "labels"}
        s, t = (m.double()(**inputs, output_hidden_states=True) for m in (student, teacher))
        student.float(), teacher.float()
        got = loss(made, data).item()
    cross_entropy = -np.log(softmax(s.logits.numpy())[np.arange(5), data["labels"].numpy()]).mean()
    divergence = kl(s.logits.numpy(), t.logits.numpy(), 4.0).mean() / (3 if reduction == "paper" else 1)
    states = [np.stack([state[:, 0].numpy() for state in out.hidden_states[:-1]]) for out in (s, t)]
    patient = 0.5 * ((states[0] - states[1]) ** 2).mean()
    assert got == pytest.approx(0.4 * cross_entropy + 0.6 * 4.0**2 * divergence + 3.0 * patient, rel=1e-4)


def test_soft_gradients_keep_their_size_when_the_temperature_grows() -> None:
    """T^2 in the weight makes up for 1/T^2 in the gradient (Hinton et al. 2015, section 2)."""
    logits, teacher = torch.tensor(RANDOM.normal(size=(2, 6, 3)))

    def gradient(temperature: float) -> torch.Tensor:
        weight = objective(model(1), model(2), alpha=1.0, temperature=temperature).weights["kd"]
        leaf = logits.clone().requires_grad_()
        (weight * CLASSES.divergence_sum(leaf, teacher, temperature)).backward()
        return leaf.grad

    assert torch.allclose(gradient(50.0), gradient(100.0), rtol=0.05, atol=1e-3)
    assert gradient(100.0).norm() > 0.1


def test_regression_learns_from_a_teacher_with_one_output() -> None:
    student, teacher, data = model(1, labels=1), model(2, labels=1), batch(labels=1)
    made = objective(student, teacher, alpha=1.0, beta=0.0, temperature=3.0)
    got = loss(made, data)
    got.backward()
    with torch.no_grad():
        inputs = {k: v for k, v in data.items() if k != "labels"}
        gap = (student(**inputs).logits - teacher(**inputs).logits).squeeze(-1).numpy()
    assert got.item() == pytest.approx(0.5 * (gap**2).mean(), rel=1e-4), "T^2 cancels: a regression has no temperature"
    assert student.classifier.weight.grad.abs().sum() > 0


def test_the_teacher_stays_in_evaluation_whatever_the_mode() -> None:
    made = objective(model(1, dropout=0.5), model(2, dropout=0.5))
    data = batch()
    inputs = {k: v for k, v in data.items() if k != "labels"}
    for mode in (True, False, True):
        made.train(mode)
        assert made.student.training is mode and made.training is mode
        assert not any(module.training for module in made.teacher.model.modules())
    with torch.no_grad():
        assert torch.equal(made.teacher.model(**inputs).logits, made.teacher.model(**inputs).logits)
        assert not torch.equal(made.student(**inputs).logits, made.student(**inputs).logits), "dropout is on"


def test_the_teacher_gets_no_gradient_and_no_label() -> None:
    seen = []
    made = objective(model(1), model(2)).train()

    def look(_module, _args, kwargs, output):
        seen.append((torch.is_grad_enabled(), "labels" in kwargs, output.loss, output.logits.requires_grad))

    made.teacher.model.register_forward_hook(look, with_kwargs=True)
    loss(made, batch()).backward()
    assert seen == [(False, False, None, False)]
    assert all(p.grad is None and not p.requires_grad for p in made.teacher.parameters())
    assert all(p.requires_grad for p in made.student.parameters())
    assert made.student.bert.embeddings.word_embeddings.weight.grad.abs().sum() > 0


def test_only_the_students_gradient_flows_and_equals_autograd_of_the_formula() -> None:
    student, teacher, data = model(1), model(2), batch()
    loss(objective(student, teacher), data).backward()
    got = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    student.zero_grad()
    inputs = {k: v for k, v in data.items() if k != "labels"}
    s = student(**inputs, output_hidden_states=True)
    t = teacher(**inputs, output_hidden_states=True)
    soft = (t.logits / 5).softmax(-1).detach()
    kd = (soft * (soft.log() - (s.logits / 5).log_softmax(-1))).sum(-1).mean()
    states = zip(s.hidden_states[:-1], t.hidden_states[:-1], strict=True)
    patient = 0.5 * torch.stack([(a[:, 0] - b[:, 0].detach()) ** 2 for a, b in states]).mean()
    label = torch.nn.functional.cross_entropy(s.logits, data["labels"])
    (0.3 * label + 0.7 * 25 * kd + 10 * patient).backward()
    for name, parameter in student.named_parameters():
        assert torch.allclose(got[name], parameter.grad, atol=1e-4, rtol=1e-3), name


@pytest.mark.parametrize("beta", [0.0, 1e-3])
def test_hidden_states_are_computed_only_for_a_patient_term(beta: float) -> None:
    made, states = objective(model(1), model(2), beta=beta), []
    for asked in (made.student, made.teacher.model):
        asked.register_forward_hook(lambda *told: states.append(told[-1].hidden_states))
    sums = made(batch())
    assert len(states) == 2 and [each is None for each in states] == [beta == 0] * 2
    assert ("patient" in sums) is ("patient" in made.weights) is ("patient" in made.counts(batch())) is (beta > 0)


@pytest.mark.parametrize("family", ["gpt2", "llama", "t5", "bart"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_what_is_compared_of_a_decoder_has_seen_the_whole_text(family: str, side: str) -> None:
    made = decoder(decoder_config(family, num_labels=3, pad_token_id=PAD), 1, AutoModelForSequenceClassification)
    texts = [[10, 11, 12, 13, END], [20, 21, END]] if family in SEQ2SEQ else [[10, 11, 12, 13], [20, 21]]
    states = []
    for first in (10, 30):  # in the first text another first word
        texts[0][0] = first
        tokenizer = decoder_tokenizer(family, side=side, pad_token="<pad>")
        batch = tokenizer.pad({"input_ids": texts}, return_tensors="pt")
        with torch.no_grad():
            told = made(**batch, output_hidden_states=True)
        states.append(compared_states(told, batch, made.config))
    assert states[0].shape == (2, 2, 16), "of the embeddings and of every layer but the last"
    seen = (states[0] - states[1]).abs().amax(-1)
    assert seen[0, 1] > 1e-3, "a later token's state tells of the first word"
    assert seen[1].max() < 1e-5, "the other text is as it was"


def test_prediction_is_the_students() -> None:
    made, data = objective(model(1), model(2)).eval(), batch()
    with torch.no_grad():
        inputs = {k: v for k, v in data.items() if k != "labels"}
        # of the last layer the student by itself computes more rows, which rounds otherwise
        torch.testing.assert_close(made(data, predict=True), made.student(**inputs).logits, atol=1e-6, rtol=1e-6)
