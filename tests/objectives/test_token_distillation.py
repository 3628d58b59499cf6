"""Distilling a masked LM gives the loss written out in plain PyTorch over whole sequences, and forgets less.

That it is the same under every ZeRO stage, for tied, untied and LoRA students, is in test_equality.py.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from masked_models import SIZE, batch, bert, distilbert, roberta
from peft import LoraConfig, get_peft_model
from torch import nn
from train_ranks import with_lora
from transformers import BertConfig, BertForMaskedLM
from worlds import WORDS, make_base, make_corpus

from recyclable import distributed
from recyclable.errors import InputError
from recyclable.lm.masked import Masked
from recyclable.objectives.token_distillation import TokenDistillation, TokenTeacher
from recyclable.objectives.token_states import Compared
from recyclable.recipes.pretrain import pretrain

ALPHA, BETA, TEMPERATURE, MIXING = 0.6, 3.0, 4.0, 0.3


def objective(student: nn.Module, teacher: nn.Module, beta: float = BETA, **more) -> TokenDistillation:
    taught_by = TokenTeacher(teacher, Compared(first=True) if beta > 0 else None)
    return TokenDistillation(student, taught_by, alpha=ALPHA, beta=beta, temperature=TEMPERATURE, term="mlm", **more)


def loss(made: TokenDistillation, data: dict[str, torch.Tensor]) -> torch.Tensor:
    sums, counts = made(data), made.counts(data)
    assert sums.keys() == counts.keys() == made.weights.keys()
    return sum(weight * sums[term] / counts[term] for term, weight in made.weights.items())


def kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return (p * (p / q).log()).sum(-1)


DIVERGENCES = {
    "forward": lambda p, q: kl(p, q),
    "reverse": lambda p, q: kl(q, p),
    "jensen_shannon": lambda p, q: (
        MIXING * kl(p, MIXING * p + (1 - MIXING) * q) + (1 - MIXING) * kl(q, MIXING * p + (1 - MIXING) * q)
    ),
}


def formula(
    student: nn.Module,
    teacher: nn.Module,
    data: dict[str, torch.Tensor],
    labels: torch.Tensor,
    beta: float,
    divergence: str = "forward",
):
    """The loss over whole sequences, from the definition."""
    inputs = {name: data[name] for name in ("input_ids", "attention_mask")}
    s = student(**inputs, labels=labels, output_hidden_states=True)
    with torch.no_grad():
        t = teacher(**inputs, output_hidden_states=True)
    here = labels != -100
    p, q = ((out.logits[here] / TEMPERATURE).softmax(-1) for out in (t, s))
    total = (1 - ALPHA) * s.loss + ALPHA * TEMPERATURE**2 * DIVERGENCES[divergence](p, q).mean()
    if beta:
        states = [torch.stack([h[:, 0] for h in out.hidden_states[:-1]]) for out in (s, t)]
        total = total + beta * 0.5 * nn.functional.mse_loss(*states)
    return total


def untied() -> nn.Module:
    return BertForMaskedLM(BertConfig(**SIZE, tie_word_embeddings=False))


def wide() -> nn.Module:
    return BertForMaskedLM(BertConfig(**{**SIZE, "hidden_size": 24}))


@pytest.mark.parametrize(
    ("student", "teacher", "beta"),
    [
        (bert, bert, BETA),
        (roberta, roberta, BETA),
        (untied, untied, BETA),
        (distilbert, distilbert, BETA),
        (bert, roberta, 0.0),
        (bert, wide, 0.0),
        (wide, distilbert, 0.0),
        (distilbert, wide, 0.0),
    ],
)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_loss_and_gradients_are_those_of_the_formula_over_whole_sequences(
    student, teacher, beta: float, divergence: str
) -> None:
    torch.manual_seed(0)
    student, teacher, (data, labels) = student().eval(), teacher().eval(), batch()
    got = loss(objective(student, teacher, beta, divergence=divergence, mixing=MIXING), data)
    got.backward()
    gradients = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    student.zero_grad()
    wanted = formula(student, teacher, data, labels, beta, divergence)
    wanted.backward()
    assert got.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert gradients.keys() == {name for name, p in student.named_parameters() if p.grad is not None}
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, student.get_parameter(name).grad, atol=1e-5), name
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())


def test_a_lora_student_learns_through_its_frozen_head() -> None:
    torch.manual_seed(0)
    plain, teacher, (data, labels) = bert().eval(), bert().eval(), batch()
    student = with_lora(plain)
    loss(objective(student, teacher), data).backward()
    gradients = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    assert gradients and all("lora_" in name for name in gradients)
    student.zero_grad()
    formula(student, teacher, data, labels, BETA).backward()
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, student.get_parameter(name).grad, atol=1e-6), name
    assert any(gradient.abs().max() > 1e-4 for gradient in gradients.values())


def test_an_adapter_on_the_last_layer_itself_learns() -> None:
    """Its weight is no longer all that the layer computes with: the layer is called."""
    torch.manual_seed(0)
    plain, teacher, (data, labels) = untied().eval(), bert().eval(), batch()
    student = get_peft_model(plain, LoraConfig(r=4, target_modules=["decoder"], init_lora_weights=False))
    got = loss(objective(student, teacher), data)
    got.backward()
    gradients = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    student.zero_grad()
    wanted = formula(student, teacher, data, labels, BETA)
    wanted.backward()
    assert got.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert len(gradients) == 2
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, student.get_parameter(name).grad, atol=1e-5), name


def test_last_layers_are_fused_into_the_loss_and_stay_parts_of_their_models() -> None:
    made, (data, _) = objective(bert(), roberta(), beta=0.0), batch()
    layers = made.student.cls.predictions.decoder, made.teacher.model.lm_head.decoder
    for layer in layers:
        layer.register_forward_hook(lambda *_: pytest.fail("all logits at once"))
    made(data)["lm"].backward()
    assert {name.split(".")[0] for name in made.state_dict()} == {"student", "teacher"}
    borrowed = {id(parameter) for module, parameter in made.borrowed() if module is made.over_vocabulary}
    assert borrowed == {id(p) for layer in layers for p in layer.parameters()} != set()


def test_the_parts_of_the_loss_are_told_and_not_learned_from_twice() -> None:
    torch.manual_seed(0)
    made, (data, _) = objective(bert().eval(), bert().eval(), beta=0.0), batch()
    sums = made(data)
    whole = (1 - ALPHA) * sums["mlm"] + ALPHA * TEMPERATURE**2 * sums["kd"]
    assert sums["lm"].item() == pytest.approx(whole.item(), rel=1e-6)
    assert [sums[term].requires_grad for term in made.weights] == [True, False, False]
    assert made.weights == {"lm": 1.0, "mlm": 0.0, "kd": 0.0}


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_run_config_chooses_the_divergence(tmp_path: Path, divergence: str) -> None:
    torch.manual_seed(0)
    student, teacher, (data, labels) = bert().eval(), bert().eval(), batch()
    settings = {"alpha": ALPHA, "beta": BETA, "temperature": TEMPERATURE, "divergence": divergence}
    if divergence == "jensen_shannon":
        settings["mixing"] = MIXING
    made = config(tmp_path, tmp_path, tmp_path, teacher="one", **settings).objective(student, teacher)
    wanted = formula(student, teacher, data, labels, BETA, divergence)
    assert loss(made, data).item() == pytest.approx(wanted.item(), rel=1e-5)


def test_the_teacher_stays_in_evaluation_and_reads_no_targets() -> None:
    teacher = bert()
    made = objective(bert(), teacher)
    data, _ = batch()
    for mode in (True, False, True):
        made.train(mode)
        assert made.student.training is mode and not any(module.training for module in teacher.modules())
    told = made.teacher.signals(data)
    again = made.teacher.signals({**data, "targets": data["targets"].flip(0)})
    assert torch.equal(told.hidden, again.hidden) and not told.hidden.requires_grad


@pytest.mark.parametrize("rows", [(48, 40), (40, 48)])
def test_vocabularies_padded_to_other_sizes(rows: tuple[int, int]) -> None:
    """What the teacher lacks has probability zero for it; what the student lacks is left out of its distribution."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    student, teacher = (
        BertForMaskedLM(BertConfig(vocab_size=n, **sizes, max_position_embeddings=16, initializer_range=0.3)).eval()
        for n in rows
    )
    data, _ = batch()
    inputs = {name: data[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        s, t = (model(**inputs).logits.flatten(0, 1)[data["positions"]].double() for model in (student, teacher))
        got = objective(student, teacher, beta=0.0)(data)["kd"].item()
    common = min(rows)
    p = (t[:, :common] / TEMPERATURE).softmax(-1)
    q = (s / TEMPERATURE).softmax(-1)[:, :common]
    assert got == pytest.approx((p * (p / q).log()).sum().item(), rel=1e-5)


def test_a_batch_without_a_masked_token_costs_only_the_patient_term() -> None:
    data, _ = batch(masked=0.0)
    made = objective(bert().eval(), bert().eval())
    sums = made(data)
    assert made.counts(data) == {"lm": 0, "mlm": 0, "kd": 0, "patient": 3}
    assert sums["lm"].item() == sums["mlm"].item() == sums["kd"].item() == 0 and sums["patient"].item() > 0


# ---- `recyclable pretrain` with a teacher ------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def no_group_left() -> Iterator[None]:
    yield
    distributed.shutdown()


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("old") / "base")


def config(folder: Path, base: Path, train: Path, **changed) -> Masked:
    settings = {"max_steps": 60, "learning_rate": 5e-3, "train_batch_size": 16, "max_length": 24, "save_every": 0}
    settings |= {"dropout": 0.0, "eval_every": 60, "corpus": {"train": str(train)}}
    return Masked(**{**settings, "base": str(base), "out": folder, **changed})


def other_words(corpus: Path, folder: Path) -> Path:
    """The same language in other words: w24 to w47 for w0 to w23."""
    text = (corpus / "train.txt").read_text().split("\n")
    folder.mkdir()
    lines = (" ".join(f"w{int(word[1:]) + 24}" for word in line.split()) for line in text)
    (folder / "train.txt").write_text("\n".join(lines))
    return folder


def test_with_the_old_base_as_teacher_an_upgrade_forgets_less(tmp_path: Path, old: Path) -> None:
    distributed.init()
    first = make_corpus(tmp_path / "first")
    second = other_words(first, tmp_path / "second")
    both = {"corpus": {"train": str(second), "heldout": str(first / "train.txt")}}
    m0 = tmp_path / "m0"
    pretrain(config(m0, old, first), {})
    plain = pretrain(config(tmp_path / "plain", m0, second, **both), {})
    taught = pretrain(config(tmp_path / "taught", m0, second, **both, teacher=str(m0), alpha=0.7), {})
    known = taught["heldout"]["before"]["loss"]
    assert known == plain["heldout"]["before"]["loss"] < math.log(len(WORDS)) - 1
    forgot, forgot_less = (run["heldout"]["after"]["loss"] - known for run in (plain, taught))
    assert forgot > 0.5 and forgot_less < 0.7 * forgot
    assert taught["teacher"] == {"name": str(m0), "fingerprint": taught["ancestors"][0]["fingerprint"]}
    assert plain["teacher"] is None


def test_a_teacher_that_cannot_teach_is_refused_before_anything_is_written(tmp_path: Path, old: Path) -> None:
    corpus, out = make_corpus(tmp_path / "corpus", documents=10), tmp_path / "out"
    headless = make_base(tmp_path / "headless", mlm_head=False)
    narrow = make_base(tmp_path / "narrow", hidden=16)
    for teacher, changed, field, said in (
        (tmp_path / "nowhere", {}, "nowhere", "is missing"),
        (headless, {}, "teacher", "no trained masked-LM head"),
        (narrow, {"beta": 1.0}, "beta", "2 layers x 16, base 2 x 32"),
    ):
        with pytest.raises(InputError) as error:
            pretrain(config(out, old, corpus, teacher=str(teacher), **changed), {})
        assert field in str(error.value.where) and said in str(error.value)
        assert not out.exists()


def test_a_narrower_teacher_with_the_same_tokenizer_may_teach(tmp_path: Path, old: Path) -> None:
    distributed.init()
    corpus = make_corpus(tmp_path / "corpus", documents=10)
    narrow = make_base(tmp_path / "narrow", hidden=16, layers=1)
    pretrain(config(tmp_path / "out", old, corpus, max_steps=2, eval_every=2, teacher=str(narrow)), {})
    assert json.loads((tmp_path / "out" / "lineage.json").read_text())["teacher"]["name"] == str(narrow)
