"""Encoder-decoders: encoder and decoder called apart give the model's own logits, scaled and with all that is added."""

from __future__ import annotations

import pytest
import torch
from families import config, drawn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForSeq2SeqLM

from recyclable.architectures.heads import EncoderDecoder, language_head
from recyclable.kernels import LossSettings
from recyclable.objectives.vocabulary_loss import VocabularyLoss

READ = torch.tensor([[5, 6, 7, 8, 9, 10], [12, 3, 4, 30, 0, 0]])
TOLD = torch.tensor([[2, 11, 12, 13], [2, 21, 0, 0]])
REAL, SAID = (READ != 0).long(), (TOLD != 0).long()
_T5 = {**config("t5").to_dict(), "pad_token_id": 0}
_BART = {
    **{"vocab_size": 40, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2},
    **{"decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 32},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2, "forced_eos_token_id": 2},
}


def made(family: str, **changed: object):
    sizes = _T5 if "t5" in family or "switch" in family else _BART
    kept = {name: value for name, value in sizes.items() if name not in ("model_type", "scale_decoder_outputs")}
    return AutoConfig.for_model(family, **{**kept, **changed})


# family -> the scale of its logits
HEADS = {
    "t5": (made("t5"), 0.25),
    "t5 1.1": (made("t5", tie_word_embeddings=False), 1.0),
    "mt5": (made("mt5"), 1.0),
    "umt5": (made("umt5"), 0.25),
    **{family: (made(family), 1.0) for family in ("bart", "mbart", "pegasus", "marian", "m2m_100", "led", "plbart")},
}


@pytest.mark.parametrize("family", HEADS)
def test_loss_and_gradients_are_those_of_the_model_s_own_logits(family: str) -> None:
    model = drawn(HEADS[family][0], AutoModelForSeq2SeqLM)
    if hasattr(model, "final_logits_bias"):
        model.final_logits_bias.normal_(generator=torch.Generator().manual_seed(1))
    inputs = {"input_ids": READ, "attention_mask": REAL, "decoder_input_ids": TOLD, "decoder_attention_mask": SAID}
    head = language_head(model)
    assert isinstance(head.body, EncoderDecoder) and head.is_linear
    assert head.scale == pytest.approx(HEADS[family][1]) and head.softcap is None
    targets, real = TOLD.roll(-1, 1).flatten(), SAID.flatten().bool()

    wanted = F.cross_entropy(model(**inputs).logits.flatten(0, 1)[real], targets[real], reduction="sum")
    wanted.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    hidden = head.transform(head.body(**inputs).last_hidden_state).flatten(0, 1)[real]
    found = VocabularyLoss(head, None, LossSettings())(hidden, None, targets[real]).loss
    found.backward()
    assert found.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert gradients.keys() == {name for name, p in model.named_parameters() if p.grad is not None}
    for name, gradient in gradients.items():
        own = model.get_parameter(name).grad
        assert torch.allclose(gradient, own, rtol=1e-4, atol=1e-5 * max(1.0, own.abs().max())), name
    with torch.no_grad():
        assert torch.allclose(head.logits(hidden), model(**inputs).logits.flatten(0, 1)[real], atol=1e-5)


def test_what_is_added_to_logits_is_read_when_it_is_used() -> None:
    """An engine puts buffers elsewhere after the head was found."""
    model = drawn(made("marian"), AutoModelForSeq2SeqLM)
    head = language_head(model)
    model.final_logits_bias = torch.full_like(model.final_logits_bias, 3.0)
    assert torch.equal(head.bias, torch.full((40,), 3.0))


def test_a_decoder_s_states_are_told_embedding_output_included() -> None:
    model = drawn(made("t5"), AutoModelForSeq2SeqLM)
    told = language_head(model).body(input_ids=READ, decoder_input_ids=TOLD, output_hidden_states=True)
    wanted = model(input_ids=READ, decoder_input_ids=TOLD, output_hidden_states=True).decoder_hidden_states
    assert len(told.hidden_states) == 3
    assert all(torch.equal(one, other) for one, other in zip(told.hidden_states, wanted, strict=True))
