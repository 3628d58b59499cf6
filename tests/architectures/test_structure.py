"""What a config's structure tells: embeddings, tied names, the head that stands alone, norms, positions."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, VOCABULARY, config
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from recyclable.architectures.structure import Structure, is_norm, label_tensors, on_meta
from recyclable.errors import InputError
from recyclable.weights.base import Base
from recyclable.weights.fingerprint import fingerprint
from recyclable.weights.vocabulary import vocabulary_tensors

WORDS = {
    **dict.fromkeys(
        ("bert", "roberta", "distilbert", "electra", "deberta-v2", "albert"), "embeddings.word_embeddings.weight"
    ),
    **dict.fromkeys(("llama", "qwen3", "gemma2", "cohere", "granite"), "embed_tokens.weight"),
    **{"modernbert": "embeddings.tok_embeddings.weight", "gpt2": "wte.weight", "opt": "decoder.embed_tokens.weight"},
    **{"gpt_neox": "embed_in.weight", "t5": "shared.weight"},
}
MASKED = ("bert", "roberta", "distilbert", "electra", "deberta-v2", "albert", "modernbert")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_a_base_s_tensors_with_a_row_per_token(family: str, tied: bool, tmp_path) -> None:
    """Of a decoder the untied head is one of them; that of a masked model has several layers and is no part of it."""
    auto_class = AutoModelForSeq2SeqLM if family == "t5" else AutoModelForCausalLM
    auto_class = AutoModelForMaskedLM if family in MASKED else auto_class
    auto_class.from_config(config(family, tie_word_embeddings=tied)).save_pretrained(tmp_path)
    base = Base(tmp_path)
    # GPT-NeoX's files have another name for it; T5 is tied whatever its config says
    apart = not tied and family not in {*MASKED, "t5"}
    head = {"lm_head.weight"} if apart else set()
    assert vocabulary_tensors(base) == {WORDS[family]} | head
    assert all(base.shape(name)[0] == VOCABULARY for name in vocabulary_tensors(base))
    assert Structure(base.config).head == (set() if family in MASKED else {"lm_head.weight"})


@pytest.mark.parametrize("family", FAMILIES)
def test_norms_are_the_tensors_of_one_dimension_that_start_at_one(family: str) -> None:
    model = AutoModel.from_config(config(family, **({"initializer_factor": 1.0} if family == "t5" else {})))
    norms = {name for name, module in model.named_modules() if is_norm(module)}
    ones = {name.removesuffix(".weight") for name, p in model.named_parameters() if p.dim() == 1 and (p == 1).all()}
    if family == "gemma2":  # weights around 0, to which its norms add 1
        ones = {name.removesuffix(".weight") for name, p in model.named_parameters() if p.dim() == 1}
    assert norms == ones != set()


def test_positions_are_as_many_as_a_model_can_take() -> None:
    for family in ("bert", "roberta", "distilbert", "electra", "gpt2", "opt"):
        limit = Structure(config(family)).positions
        assert limit == (31 if family == "roberta" else 32)
        model = AutoModel.from_config(config(family)).eval()
        model(input_ids=torch.full((1, limit), 5))
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.full((1, limit + 1), 5))
    assert Structure(config("t5")).positions is None


def test_tensors_that_some_version_saved_without_need_are_no_part_of_a_base(tmp_path) -> None:
    """GPT-2's causal masks, as in the files on the hub."""
    AutoModelForCausalLM.from_config(config("gpt2")).save_pretrained(tmp_path)
    before, file = fingerprint(Base(tmp_path)), tmp_path / "model.safetensors"
    save_file(
        load_file(file) | {"transformer.h.0.attn.bias": torch.ones(1, 1, 32, 32)}, file, metadata={"format": "pt"}
    )
    assert fingerprint(Base(tmp_path)) == before
    assert "h.0.attn.c_attn.bias" in Base(tmp_path)


def test_a_tied_tensor_counts_once_however_often_and_under_which_of_its_names_it_is_stored(tmp_path) -> None:
    AutoModelForSeq2SeqLM.from_config(config("t5")).save_pretrained(tmp_path)
    before, file = fingerprint(Base(tmp_path)), tmp_path / "model.safetensors"
    words = load_file(file).pop("shared.weight")
    rest = {name: tensor for name, tensor in load_file(file).items() if name != "shared.weight"}
    again = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")
    for names in (("shared.weight", *again), again):
        save_file(rest | {name: words.clone() for name in names}, file, metadata={"format": "pt"})
        assert fingerprint(Base(tmp_path)) == before and "shared.weight" in Base(tmp_path)


def test_a_head_s_tensors_with_a_row_per_label() -> None:
    found = {
        family: label_tensors(config(family), AutoModelForSequenceClassification)
        for family in ("bert", "roberta", "llama", "t5")
    }
    assert found == {
        "bert": {"classifier.weight", "classifier.bias"},
        "roberta": {"classifier.out_proj.weight", "classifier.out_proj.bias"},
        "llama": {"score.weight"},
        "t5": {"classification_head.out_proj.weight", "classification_head.out_proj.bias"},
    }
    assert label_tensors(config("roberta"), AutoModelForTokenClassification) == {"classifier.weight", "classifier.bias"}


def test_a_structure_has_neither_weights_nor_an_effect_on_its_config_or_on_torch_s_generator() -> None:
    made = config("bert")
    before, state = made.to_dict(), torch.get_rng_state()
    model = on_meta(made)
    assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    assert made.to_dict() == before and torch.equal(torch.get_rng_state(), state)


def test_a_config_that_makes_no_model_is_told_in_one_line() -> None:
    with pytest.raises(InputError, match=r"config\.json: makes no model: The hidden size"):
        on_meta(config("bert", num_attention_heads=3))
