"""A base decides which kind of language model it is; what a kind wants of it and cannot have is said in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from language_models import CAUSAL, FAMILIES, SPANS, save_tiny, short_texts, tiny, tokenizer_of
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForSeq2SeqLM
from worlds import make_base

from recyclable.errors import InputError
from recyclable.lm import LM_KINDS
from recyclable.lm.parts.kind import LMKind
from recyclable.models.language import language_model
from recyclable.recipes.pretrain import pretrain
from recyclable.recipes.pretrain_settings import kind_of, read_pretrain_settings
from recyclable.recipes.pretrain_text import read_text
from recyclable.weights.base import Base
from recyclable.weights.fingerprint import fingerprint
from recyclable.weights.sources import fill
from recyclable.weights.vocabulary import load_tokenizer

REST = {"corpus": "c.txt", "out": "o", "max_steps": 5, "learning_rate": 1e-3}


def kind(base: Path | str, **settings: Any) -> LMKind:
    return read_pretrain_settings({**REST, "base": str(base), **settings}, "run.yaml")


def required(base: Path, tokenizer: Any = None, **settings: Any) -> LMKind:
    made = kind(base, **settings)
    made.require(Base(base), tokenizer or load_tokenizer(base))
    return made


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3", "opt", "gpt_neox", "t5", "bart", "bert", "modernbert"])
@pytest.mark.parametrize("headless", [False, True])
def test_the_base_itself_decides(family: str, headless: bool, tmp_path: Path) -> None:
    model = tiny(family)
    (AutoModel.from_config(model.config) if headless else model).save_pretrained(tmp_path)
    wanted = {"AutoModelForCausalLM": "causal", "AutoModelForSeq2SeqLM": "spans"}
    found = kind(tmp_path)
    assert found.lm == kind_of(str(tmp_path)) == wanted.get(FAMILIES[family][0].__name__, "masked")
    assert type(found) is LM_KINDS.get(found.lm)
    assert found.attention == ("full" if found.lm == "masked" else "documents")


def test_a_named_kind_is_taken_and_a_base_that_is_not_there_yet_is_masked(tmp_path: Path) -> None:
    save_tiny("gpt2", tmp_path)
    assert kind(tmp_path, lm="masked").lm == "masked"
    assert kind(tmp_path / "none").lm == "masked"


def test_what_a_kind_cannot_have_is_named(tmp_path: Path) -> None:
    decoder, encoder = save_tiny("gpt2", tmp_path / "gpt2"), make_base(tmp_path / "bert")
    t5 = save_tiny("t5", tmp_path / "t5")
    assert required(decoder).lm == "causal" and required(t5).lm == "spans" and required(encoder).lm == "masked"
    with pytest.raises(InputError, match="is 'bert', no causal language model; expected a decoder, or another lm"):
        required(encoder, lm="causal")
    with pytest.raises(InputError, match="is 'gpt2', expected an encoder-decoder for lm: spans"):
        required(decoder, lm="spans")
    bare, without_sentinels = tokenizer_of(SPANS), load_tokenizer(encoder)
    without_sentinels.eos_token = "[SEP]"
    bare.eos_token = None
    with pytest.raises(InputError, match=r"has no end token \(eos_token\)"):
        required(t5, bare)
    with pytest.raises(InputError, match="its tokenizer has no <extra_id_0>, expected sentinels as T5's tokenizer has"):
        required(t5, without_sentinels)
    with pytest.raises(InputError, match=r"max_length: 300 tokens may have 15 spans taken out, but .* 12 sentinels"):
        required(t5, max_length=300)
    config = json.loads((t5 / "config.json").read_text())
    (t5 / "config.json").write_text(json.dumps({**config, "decoder_start_token_id": None}))
    with pytest.raises(InputError, match=r"config\.json: decoder_start_token_id is None, expected a token's id"):
        required(t5)


@pytest.mark.parametrize("given", [{"share": 0.6}, {"share": 0.001}, {}, {"share": 0.1, "rate": 2}])
def test_replay_s_settings_are_checked(given: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"run.yaml: .*replay\."):
        kind("b", replay={"corpus": "old.txt", **given})


@pytest.mark.parametrize("name", ["lm_head_steps", "lm_head_learning_rate"])
def test_what_a_fresh_head_is_for_is_refused_where_the_head_is_kept(name: str) -> None:
    with pytest.raises(InputError, match=f"{name} is given, but nothing reads it with lm_head: keep"):
        kind("b", lm="causal", lm_head="keep", **{name: 3})


def test_gpt_neox_keeps_its_untied_head_under_the_name_of_its_files(tmp_path: Path) -> None:
    base = save_tiny("gpt_neox", tmp_path)
    stored = load_file(base / "model.safetensors")
    assert "embed_out.weight" in stored
    _, fresh = language_model(Base(base), "CausalLM", 1, None)
    assert fresh == [] and torch.equal(Base(base)["lm_head.weight"], stored["embed_out.weight"])


@pytest.mark.parametrize("family", ["t5", "llama untied"])
def test_a_fresh_head_is_all_of_the_head_and_nothing_else(family: str, tmp_path: Path) -> None:
    base = Base(save_tiny(family, tmp_path))
    of = FAMILIES[family][0].__name__.removeprefix("AutoModelFor")
    assert language_model(base, of, 1, None)[1] == []
    drawn = language_model(base, of, 1, None, fresh_head=True)[1]
    assert drawn == ([] if family == "t5" else ["lm_head.weight"])  # T5's is its embedding


def test_an_encoder_decoder_without_its_decoder_is_refused(tmp_path: Path) -> None:
    save_tiny("t5", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({n: t for n, t in tensors.items() if not n.startswith("decoder.final")}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"lacks 1 backbone tensors: decoder\.final_layer_norm\.weight"):
        language_model(Base(tmp_path), "Seq2SeqLM", 1, None)


@pytest.mark.parametrize(
    ("text", "said"), [("w1 w2 w3 w4 w5", "only one sequence, expected another to hold out"), ("w1", "it has 3 tokens")]
)
def test_old_text_of_a_sequence_or_less_is_refused_under_its_own_name(
    text: str, said: str, tmp_path: Path, own_cache: Path
) -> None:
    base = save_tiny("gpt2", tmp_path / "base")
    short_texts(tmp_path / "new.txt", documents=50)
    (tmp_path / "old.txt").write_text(f"{text}\n")
    replay = {"corpus": str(tmp_path / "old.txt"), "share": 0.1}
    made = kind(base, corpus=str(tmp_path / "new.txt"), max_length=6, replay=replay)
    with pytest.raises(InputError, match=rf"replay\.corpus: {said}"):
        read_text(made, Base(base), tokenizer_of(CAUSAL))


def test_t5_s_output_embedding_is_its_own_where_the_files_say_so(tmp_path: Path) -> None:
    """As of T5 1.1, Flan-T5 and mT5: transformers' class ties it, and lets files win that hold other values."""
    base = save_tiny("t5 unscaled", tmp_path)
    tied, tensors = Base(base), load_file(base / "model.safetensors")
    assert "lm_head.weight" not in tied and "lm_head.weight" not in tensors
    save_file({**tensors, "lm_head.weight": tensors["shared.weight"].clone()}, base / "model.safetensors")
    assert fingerprint(Base(base)) == fingerprint(tied) and "lm_head.weight" not in Base(base)
    head = torch.randn(tensors["shared.weight"].shape, generator=torch.Generator().manual_seed(9))
    save_file({**tensors, "lm_head.weight": head}, base / "model.safetensors", metadata={"format": "pt"})
    apart = Base(base)
    assert torch.equal(apart["lm_head.weight"], head) and fingerprint(apart) != fingerprint(tied)
    model, fresh = language_model(apart, "Seq2SeqLM", 1, None)
    ids = torch.tensor([[20, 21, 22]])
    wanted = AutoModelForSeq2SeqLM.from_pretrained(base)(input_ids=ids, decoder_input_ids=ids).logits
    assert fresh == [] and torch.equal(fill(model)(input_ids=ids, decoder_input_ids=ids).logits, wanted)


@pytest.mark.parametrize(
    ("ds_config", "computed"),
    [
        ({}, "float32"),
        ({"fp16": {"enabled": True}}, "float16"),
        ({"torch_autocast": {"enabled": True, "dtype": "float16"}}, "float16"),
        ({"bf16": {"enabled": True}}, None),
        ({"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}, None),
    ],
)
def test_logits_in_bf16_are_for_models_that_compute_in_bf16(
    ds_config: dict[str, Any], computed: str | None, tmp_path: Path
) -> None:
    """What is wrong with the run besides is found later."""
    said = f"logits: is bf16, but the model computes in {computed}" if computed else str(tmp_path / "none")
    with pytest.raises(InputError, match=said):
        pretrain(kind(tmp_path / "none", logits="bf16"), ds_config)
