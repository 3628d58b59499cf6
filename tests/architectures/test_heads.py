"""Losses over states before the head are those of the models' own logits: soft-caps and scales reach the kernels."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from families import config, drawn
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

from recyclable.architectures.heads import LanguageHead, language_head
from recyclable.architectures.structure import on_meta
from recyclable.errors import InputError
from recyclable.kernels import LossSettings
from recyclable.objectives.token_loss import TokenLoss
from recyclable.objectives.vocabulary_loss import VocabularyLoss

IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [12, 3, 4, 30, 20, 10]])
SIZE = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
# family -> scale and soft-cap of its logits
CAUSAL = {
    "gpt2": (config("gpt2"), 1.0, None),
    "opt": (config("opt"), 1.0, None),
    "gpt_neox": (config("gpt_neox"), 1.0, None),
    "llama": (config("llama"), 1.0, None),
    "qwen3": (config("qwen3"), 1.0, None),
    "gemma2": (config("gemma2", final_logit_softcapping=3.0), 1.0, 3.0),
    "gemma2 uncapped": (config("gemma2", final_logit_softcapping=None), 1.0, None),
    "gemma3": (
        AutoConfig.for_model("gemma3_text", **SIZE, num_key_value_heads=1, head_dim=6, final_logit_softcapping=2.5),
        1.0,
        2.5,
    ),
    "cohere": (config("cohere", logit_scale=0.3), 0.3, None),
    "granite": (config("granite", logits_scaling=7.0), 1 / 7, None),
    "phi": (AutoConfig.for_model("phi", **SIZE), 1.0, None),  # its head has a bias
    "hyperclovax": (AutoConfig.for_model("hyperclovax", **SIZE, logits_scaling=7.0), 7.0, None),
}
UNBUILT = {
    "falcon_h1": (AutoConfig.for_model("falcon_h1", lm_head_multiplier=0.4), 0.4, None),
    "minicpm3": (AutoConfig.for_model("minicpm3", dim_model_base=512), 0.2, None),
    "nanochat": (AutoConfig.for_model("nanochat"), 1.0, 15.0),
    "recurrent_gemma": (AutoConfig.for_model("recurrent_gemma", logits_soft_cap=20.0), 1.0, 20.0),
}
"""Too large by default: only asked, on the meta device."""
SETTINGS = LossSettings("forward", 0.5, temperature=2.0, hard_weight=0.4, soft_weight=0.6)


def model(family: str, seed: int = 0):
    return drawn(CAUSAL[family][0], AutoModelForCausalLM, seed)


def states(head: LanguageHead) -> torch.Tensor:
    return head.transform(head.body(input_ids=IDS).last_hidden_state).flatten(0, 1)


def plain(student: torch.Tensor, teacher: torch.Tensor | None) -> torch.Tensor:
    """From whole logits [M, V], by the definitions."""
    loss = F.cross_entropy(student, IDS.flatten(), reduction="sum")
    if teacher is None:
        return loss
    p, q = (torch.log_softmax(logits / 2.0, -1) for logits in (teacher, student))
    return 0.4 * loss + 0.6 * 4.0 * (p.exp() * (p - q)).sum()


@pytest.mark.parametrize("family", CAUSAL)
@pytest.mark.parametrize("taught_by", [None, "gemma2", "cohere", "llama", "phi"])
def test_the_loss_is_that_of_the_model_s_own_logits(family: str, taught_by: str | None) -> None:
    student, teacher = model(family), taught_by and model(taught_by, seed=1)
    heads = [language_head(student), teacher and language_head(teacher)]
    assert all(head is None or head.is_linear for head in heads)
    with torch.no_grad():
        told = teacher and states(heads[1])
        logits = [each and each(input_ids=IDS).logits.flatten(0, 1) for each in (student, teacher)]

    def loss(*of: LanguageHead | None) -> torch.Tensor:
        settings = SETTINGS if taught_by else LossSettings()
        return VocabularyLoss(*of, settings)(states(heads[0]), told, IDS.flatten()).loss

    wanted = plain(*logits)
    assert loss(*heads).item() == pytest.approx(wanted.item(), rel=1e-5)
    for place, of in enumerate((family, taught_by)):
        if of is not None and CAUSAL[of][1:] != (1.0, None):
            bare = [replace(head, scale=1.0, softcap=None) if i == place else head for i, head in enumerate(heads)]
            assert loss(*bare).item() != pytest.approx(wanted.item(), rel=1e-3)


@pytest.mark.parametrize("family", [*CAUSAL, *UNBUILT])
def test_scale_and_soft_cap_are_found(family: str) -> None:
    made, scale, softcap = (CAUSAL | UNBUILT)[family]
    head = language_head(on_meta(made, AutoModelForCausalLM))
    assert (head.scale, head.softcap) == (pytest.approx(scale, rel=1e-11), softcap)


@pytest.mark.parametrize(
    ("family", "field", "value"),
    [("gemma2", "final_logit_softcapping", 3.0), ("cohere", "logit_scale", 0.3), ("granite", "logits_scaling", 7.0)],
)
def test_a_last_layer_with_an_adapter_is_called_and_scaled_and_capped_as_well(family, field, value) -> None:
    whole = drawn(config(family, **{field: value}, tie_word_embeddings=False), AutoModelForCausalLM)
    peft = get_peft_model(whole, LoraConfig(r=4, target_modules=["lm_head"], init_lora_weights=False)).eval()
    head = language_head(peft)
    assert not head.is_linear and (head.scale, head.softcap) != (1.0, None)
    with pytest.raises(InputError, match="logits: is bf16, but the model's last layer is no plain linear one"):
        VocabularyLoss(head, None, LossSettings(logits="bf16"))
    wanted = plain(peft(input_ids=IDS).logits.flatten(0, 1), None)
    wanted.backward()
    gradients = {name: p.grad.clone() for name, p in peft.named_parameters() if p.grad is not None}
    peft.zero_grad()
    found = VocabularyLoss(head, None, LossSettings())(states(head), None, IDS.flatten()).loss
    found.backward()
    assert found.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert len(gradients) == 2
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, peft.get_parameter(name).grad, rtol=1e-4, atol=1e-4), name
    as_teacher = VocabularyLoss(language_head(model("llama")), head, SETTINGS)
    with torch.no_grad():
        student, logits = model("llama"), peft(input_ids=IDS).logits.flatten(0, 1)
        got = as_teacher(states(language_head(student)), states(head), IDS.flatten()).loss
        assert got.item() == pytest.approx(plain(student(input_ids=IDS).logits.flatten(0, 1), logits).item(), rel=1e-5)


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "electra", "deberta-v2", "albert", "modernbert"])
def test_a_masked_model_of_any_family_learns_from_its_own_logits(family: str) -> None:
    masked = drawn(config(family), AutoModelForMaskedLM)
    chosen = torch.zeros_like(IDS, dtype=torch.bool)
    chosen[0, 2] = chosen[1, 4] = chosen[1, 5] = True
    labels = IDS.masked_fill(~chosen, -100)
    wanted = masked(input_ids=IDS, attention_mask=torch.ones_like(IDS), labels=labels).loss
    batch = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "targets": IDS[chosen]}
    batch["positions"] = chosen.flatten().nonzero().squeeze(1)
    assert TokenLoss(masked, "mlm")(batch)["mlm"].item() / 3 == pytest.approx(wanted.item(), rel=1e-5)


def test_a_forward_that_does_something_else_gives_the_logits_itself() -> None:
    class Shifted(type(model("llama"))):
        def forward(self, *given, **more):
            told = super().forward(*given, **more)
            told.logits = told.logits.roll(1, -1) + 2.0
            return told

    student = model("llama")
    student.__class__ = Shifted
    head = language_head(student)
    assert head.body is student and not head.is_linear
    with torch.no_grad():
        logits = student(input_ids=IDS).logits
        assert torch.equal(head.logits(head.transform(logits)), logits)


def test_asking_leaves_the_model_as_it_was() -> None:
    asked = model("gemma2")
    before, modules = asked(input_ids=IDS).logits, dict(asked.named_modules())
    language_head(asked)
    assert torch.equal(asked(input_ids=IDS).logits, before) and dict(asked.named_modules()) == modules
