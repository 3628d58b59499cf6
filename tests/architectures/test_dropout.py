"""A dropout rate reaches every dropout of a family, or is refused: seen in what a model in training computes."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, config
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from recyclable.architectures.dropout import require_dropout, set_dropout
from recyclable.errors import InputError

RATE = 0.375


def rates_used(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> set[float]:
    """Every rate at which something is dropped in a forward pass."""
    seen = set()
    dropout, attention = F.dropout, F.scaled_dot_product_attention

    def spy(value, p=0.5, training=True, inplace=False):
        seen.update({p} if training else ())
        return dropout(value, p, training, inplace)

    def spy_attention(*given, dropout_p=0.0, **more):
        seen.add(dropout_p)
        return attention(*given, dropout_p=dropout_p, **more)

    monkeypatch.setattr(F, "dropout", spy)
    monkeypatch.setattr(F, "scaled_dot_product_attention", spy_attention)
    model.train()(input_ids=torch.tensor([[5, 6, 7, 8, 2], [9, 5, 6, 7, 2]]))
    return seen


def with_head(family: str) -> type:
    return AutoModelForCausalLM if family in ("cohere", "granite") else AutoModelForSequenceClassification


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_rate_is_that_of_everything_that_drops(family: str, attention: str, monkeypatch) -> None:
    made = config(family, pad_token_id=0)
    set_dropout(made, RATE)
    if attention == "sdpa" and family in ("deberta-v2", "gemma2"):
        pytest.skip("has no such attention")
    model = with_head(family).from_config(made, attn_implementation=attention)
    require_dropout(model, RATE)
    assert rates_used(model, monkeypatch) == {RATE}


@pytest.mark.parametrize("family", FAMILIES)
def test_without_dropout_training_is_deterministic(family: str) -> None:
    made = config(family, pad_token_id=0)
    set_dropout(made, 0.0)
    model = with_head(family).from_config(made).train()
    require_dropout(model, 0.0)
    ids = torch.tensor([[5, 6, 7, 8, 2]])
    assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)


def test_fields_are_found_by_their_names_also_in_configs_within_and_others_stay() -> None:
    made = AutoConfig.for_model("bart", encoder_layerdrop=0.1)
    set_dropout(made, RATE)
    rates = {name for name, value in made.to_dict().items() if value == RATE}
    assert rates == {"dropout", "attention_dropout", "activation_dropout", "classifier_dropout"}
    assert made.encoder_layerdrop == 0.1
    outer = AutoConfig.for_model("gemma3")
    set_dropout(outer, RATE)
    assert outer.text_config.attention_dropout == outer.vision_config.attention_dropout == RATE
    flags = AutoConfig.for_model("esm", token_dropout=True)
    set_dropout(flags, RATE)
    assert flags.token_dropout is True and flags.hidden_dropout_prob == RATE


def test_what_keeps_a_rate_of_its_own_is_named() -> None:
    model = AutoModelForSequenceClassification.from_config(config("bert"))
    model.bert.encoder.layer[1].output.dropout = nn.Dropout(0.5)
    set_dropout(model.config, 0.1)
    with pytest.raises(InputError, match=r"dropout: is 0\.1, but in a bert bert\.encoder\.layer\.1\.output\.dropout"):
        require_dropout(model, 0.1)
    model = AutoModelForSequenceClassification.from_config(config("opt", dropout=0.0))
    model.model.decoder.layers[0].self_attn.dropout = 0.25
    with pytest.raises(InputError, match=r"model\.decoder\.layers\.0\.self_attn\.dropout keeps 0\.25"):
        require_dropout(model, 0.0)


def test_a_family_without_dropout_has_none_or_is_refused() -> None:
    made = AutoConfig.for_model("mamba", vocab_size=40, hidden_size=16, num_hidden_layers=1)
    require_dropout(AutoModel.from_config(made), 0.0)
    with pytest.raises(InputError, match=r"dropout: is 0\.1, but a mamba has no dropout"):
        require_dropout(AutoModel.from_config(made), 0.1)


def test_a_rate_that_a_config_cannot_hold_is_refused() -> None:
    made = AutoConfig.for_model("mpt")  # whose field takes whole numbers
    with pytest.raises(InputError, match=r"dropout: is 0\.1, which MptAttentionConfig\.attn_pdrop cannot be"):
        set_dropout(made, 0.1)
