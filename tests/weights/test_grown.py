"""A base with rows for new tokens: means of old rows in all that has a row per token, read by any range."""

from __future__ import annotations

import copy
import random
from pathlib import Path

import pytest
import torch
from encoders import encoder, encoder_config
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedModel

from recyclable.errors import InputError
from recyclable.models.language import language_model
from recyclable.weights.base import Base
from recyclable.weights.fingerprint import fingerprint
from recyclable.weights.grown import GrownBase, token_dimensions
from recyclable.weights.sources import fill

TOKENS, FIRST = 100, 97
"""Three rows of padding, of which the first new tokens take two."""
PARTS = [[5, 9, 9], [11, 12], [96], [1, 2, 3, 4], [7, 8]]
ROWS = FIRST + len(PARTS)


def decoder(tied: bool) -> PreTrainedModel:
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
    return AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=TOKENS, tie_word_embeddings=tied, **sizes))


FAMILIES = {
    "bert": ("MaskedLM", lambda: encoder(encoder_config("bert"), 1)),
    "bert untied": ("MaskedLM", lambda: encoder(encoder_config("bert", tie_word_embeddings=False), 1)),
    "roberta": ("MaskedLM", lambda: encoder(encoder_config("roberta"), 1)),
    "albert": ("MaskedLM", lambda: encoder(encoder_config("albert"), 1)),
    "distilbert": ("MaskedLM", lambda: encoder(encoder_config("distilbert"), 1)),
    "t5": ("Seq2SeqLM", lambda: encoder(encoder_config("t5"), 1)),
    "t5 untied": ("Seq2SeqLM", lambda: encoder(encoder_config("t5", tie_word_embeddings=False), 1)),
    "bart": ("Seq2SeqLM", lambda: encoder(encoder_config("bart"), 1)),
    "llama": ("CausalLM", lambda: decoder(False)),
    "llama tied": ("CausalLM", lambda: decoder(True)),
    "gpt2": (
        "CausalLM",
        lambda: AutoModelForCausalLM.from_config(
            GPT2Config(vocab_size=TOKENS, n_positions=32, n_embd=8, n_layer=1, n_head=2)
        ),
    ),
}


@pytest.fixture(params=FAMILIES)
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, PreTrainedModel, Path]:
    torch.manual_seed(0)
    head, make = FAMILIES[request.param]
    model = make().eval()
    for name, buffer in model.named_buffers():
        if name == "final_logits_bias":
            buffer.copy_(torch.randn(buffer.shape))
    model.save_pretrained(tmp_path)
    return head, model, tmp_path


def mean_rows(tensor: torch.Tensor) -> torch.Tensor:
    """What has a row per token, grown by hand."""
    if tensor.shape[:2] == (1, TOKENS):
        return mean_rows(tensor[0])[None]
    return torch.cat([tensor[:FIRST], *(tensor[parts].mean(0, keepdim=True) for parts in PARTS)])


def test_all_that_has_a_row_per_token_grows_and_nothing_else(saved: tuple[str, PreTrainedModel, Path]) -> None:
    head, model, folder = saved
    grown = GrownBase(Base(folder), FIRST, PARTS)
    found, missing = language_model(grown, head, 0, None)
    assert missing == []
    fill(found)
    wanted = copy.deepcopy(model).state_dict()
    assert found.state_dict().keys() == wanted.keys()
    rows = 0
    for name, tensor in found.state_dict().items():
        per_token = TOKENS in wanted[name].shape
        right = mean_rows(wanted[name]) if per_token else wanted[name]
        assert torch.equal(tensor, right), name
        rows += per_token
    assert rows and found.config.vocab_size == ROWS


def test_a_grown_model_says_the_same_of_old_tokens(saved: tuple[str, PreTrainedModel, Path]) -> None:
    head, model, folder = saved
    found, _ = language_model(GrownBase(Base(folder), FIRST, PARTS), head, 0, None)
    ids = torch.tensor([[2, 40, 50, 60, 3]])
    with torch.no_grad():
        told = fill(found).eval()(input_ids=ids, labels=ids).logits
        wanted = model(input_ids=ids, labels=ids).logits
    assert torch.allclose(told[..., :FIRST], wanted[..., :FIRST], atol=1e-6)
    means = torch.stack([wanted[..., parts].mean(-1) for parts in PARTS], -1)
    assert torch.allclose(told[..., FIRST:], means, atol=1e-5), "a mean of rows says the mean of what they say"


def test_any_range_is_that_of_the_whole_and_the_bases_own_fingerprint_stays(tmp_path: Path) -> None:
    encoder(encoder_config("bert"), 1).half().save_pretrained(tmp_path)
    base, draw = Base(tmp_path), random.Random(0)
    wanted = fingerprint(Base(tmp_path))
    grown = GrownBase(base, FIRST, PARTS)
    for name in grown.names:
        whole = grown.hashed.read(name)
        assert whole.dtype == torch.float16 and whole.numel() == grown.stored(name).numel
        assert torch.equal(whole, grown.read(name))
        for _ in range(30):
            start, stop = sorted(draw.choices(range(whole.numel() + 1), k=2))
            assert torch.equal(grown.hashed.read(name, start, stop), whole[start:stop])
            assert torch.equal(grown.read(name, start, stop), whole[start:stop])
    name = "embeddings.word_embeddings.weight"
    old = load_file(tmp_path / "model.safetensors")[f"bert.{name}"].float()
    assert torch.equal(grown[name][FIRST + 1], old[[11, 12]].mean(0).half())
    assert fingerprint(base) == wanted


def test_rows_behind_the_new_ones_stay(tmp_path: Path) -> None:
    encoder(encoder_config("bert"), 1).save_pretrained(tmp_path)
    base = Base(tmp_path)
    grown, name = GrownBase(base, 90, PARTS), "embeddings.word_embeddings.weight"
    assert grown.config.vocab_size == TOKENS and torch.equal(grown[name][95:], base[name][95:])
    assert torch.equal(grown[name][:90], base[name][:90]) and not torch.equal(grown[name][90:95], base[name][90:95])


def test_a_family_without_tokens_is_refused(tmp_path: Path) -> None:
    encoder(encoder_config("canine"), 1).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="has no vocab_size"):
        token_dimensions(Base(tmp_path))
