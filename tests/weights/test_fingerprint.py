"""A base's fingerprint: blind to head views and file layout, not to a changed bit, dtype, tokenizer or config."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
)
from worlds import make_base

from recyclable.errors import InputError
from recyclable.weights.base import Base
from recyclable.weights.fingerprint import Fingerprint, fingerprint

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("fingerprint") / "base")


@pytest.fixture
def copy(base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(base, tmp_path / "copy"))


def of(folder: Path) -> Fingerprint:
    return fingerprint(Base(folder))


def rewrite(folder: Path, change) -> None:
    tensors = load_file(folder / WEIGHTS)
    save_file(change(tensors) or tensors, folder / WEIGHTS, metadata={"format": "pt"})


def test_the_same_for_every_view_of_a_base(base: Path, tmp_path: Path) -> None:
    for auto in (AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification):
        view = tmp_path / auto.__name__
        auto.from_pretrained(base).save_pretrained(view)
        for file in base.glob("tokenizer*"):
            shutil.copyfile(file, view / file.name)
        assert of(view) == of(base), auto


def test_head_and_pooler_do_not_enter(copy: Path, base: Path) -> None:
    def change(tensors):
        tensors["cls.predictions.transform.dense.weight"] += 1
        tensors["bert.pooler.dense.weight"] = torch.zeros(32, 32)
        tensors["bert.embeddings.position_ids"] = torch.arange(64)

    rewrite(copy, change)
    assert of(copy) == of(base)


def test_the_same_for_one_file_or_many(base: Path, tmp_path: Path) -> None:
    AutoModelForMaskedLM.from_pretrained(base).save_pretrained(tmp_path, max_shard_size="20KB")
    assert not (tmp_path / WEIGHTS).exists() and len(list(tmp_path.glob("*.safetensors"))) > 2
    assert of(tmp_path).weights == of(base).weights


def test_the_same_for_any_order_of_tensors(copy: Path, base: Path) -> None:
    content = (copy / WEIGHTS).read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    turned = json.dumps(dict(reversed(header.items()))).encode()
    (copy / WEIGHTS).write_bytes(len(turned).to_bytes(8, "little") + turned + content[8 + size :])
    assert (copy / WEIGHTS).read_bytes() != content
    assert of(copy) == of(base)


def test_old_spelling_of_layer_norms_is_folded(copy: Path, base: Path) -> None:
    def old(name: str) -> str:
        return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")

    rewrite(copy, lambda tensors: {old(name): tensor for name, tensor in tensors.items()})
    assert any(name.endswith("gamma") for name in load_file(copy / WEIGHTS))
    assert of(copy) == of(base)


def test_one_flipped_bit_of_any_backbone_tensor_changes_it(copy: Path, base: Path) -> None:
    for name in [n for n in load_file(base / WEIGHTS) if n.startswith("bert.")]:
        shutil.copyfile(base / WEIGHTS, copy / WEIGHTS)

        def flip(tensors, name=name):
            tensors[name].view(torch.uint8).view(-1)[-4] ^= 1

        rewrite(copy, flip)
        assert of(copy).weights != of(base).weights, name


def test_minus_zero_is_not_zero(copy: Path) -> None:
    rewrite(copy, lambda t: t["bert.embeddings.LayerNorm.bias"].fill_(0.0).sum() and None)
    plus = of(copy).weights
    rewrite(copy, lambda t: t["bert.embeddings.LayerNorm.bias"].fill_(-0.0).sum() and None)
    assert of(copy).weights != plus


def test_another_dtype_changes_it(copy: Path, base: Path) -> None:
    rewrite(copy, lambda tensors: {n: t.bfloat16().float() for n, t in tensors.items()})
    rounded = of(copy).weights
    rewrite(copy, lambda tensors: {n: t.bfloat16() for n, t in tensors.items()})
    assert of(copy).weights not in (rounded, of(base).weights)


def test_the_same_bytes_read_as_another_dtype_change_it(copy: Path) -> None:
    rewrite(copy, lambda tensors: {n: t.bfloat16() for n, t in tensors.items()})
    rounded = of(copy).weights
    rewrite(copy, lambda tensors: {n: t.view(torch.float16) for n, t in tensors.items()})
    assert of(copy).weights != rounded


def test_another_shape_of_the_same_bytes_changes_it(copy: Path, base: Path) -> None:
    name = "bert.embeddings.token_type_embeddings.weight"
    rewrite(copy, lambda tensors: {**tensors, name: tensors[name].reshape(1, -1)})
    assert of(copy).weights != of(base).weights


def test_a_tokenizer_of_the_same_size_with_words_exchanged_changes_it(copy: Path, base: Path) -> None:
    content = json.loads((copy / "tokenizer.json").read_text())
    words = content["model"]["vocab"]
    words["w0"], words["w1"] = words["w1"], words["w0"]
    (copy / "tokenizer.json").write_text(json.dumps(content))
    assert Tokenizer.from_file(str(copy / "tokenizer.json")).get_vocab_size() == 200
    found, own = of(copy), of(base)
    assert found.tokenizer != own.tokenizer and (found.weights, found.config) == (own.weights, own.config)


@pytest.mark.parametrize(
    ("field", "value", "counts"),
    [
        ("layer_norm_eps", 1e-5, True),
        ("hidden_act", "relu", True),
        ("num_attention_heads", 4, True),
        ("architectures", ["BertModel"], False),
        ("hidden_dropout_prob", 0.5, False),
        ("id2label", {"0": "a", "1": "b", "2": "c"}, False),
        ("transformers_version", "0", False),
    ],
)
def test_config_fields_count_when_they_change_outputs(copy: Path, base: Path, field, value, counts) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, field: value}))
    found, own = of(copy), of(base)
    assert (found.config != own.config) is counts
    assert (found.weights, found.tokenizer) == (own.weights, own.tokenizer)


@pytest.mark.parametrize("tied", [True, False])
def test_an_untied_language_model_head_is_part_of_the_base(tmp_path: Path, tied: bool) -> None:
    size = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(**size, intermediate_size=8, tie_word_embeddings=tied)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    rewrite(tmp_path, lambda t: {**t, "lm_head.weight": t["model.embed_tokens.weight"].clone()})
    before = of(tmp_path).weights
    assert ("lm_head.weight" in Base(tmp_path)) is not tied
    rewrite(tmp_path, lambda t: {**t, "lm_head.weight": t["lm_head.weight"] + 1})
    assert (of(tmp_path).weights == before) is tied


def test_tensors_come_under_canonical_names_whatever_the_view(base: Path, tmp_path: Path) -> None:
    AutoModel.from_pretrained(base).save_pretrained(tmp_path)
    with_prefix, without = Base(base), Base(tmp_path)
    assert with_prefix.names == without.names
    assert "embeddings.word_embeddings.weight" in without and "pooler.dense.weight" not in without
    for name in without.names:
        assert torch.equal(with_prefix[name], without[name]) and without.shape(name) == tuple(without[name].shape)


@pytest.mark.parametrize(
    ("index", "said"),
    [
        ("{}", "broken, expected JSON with a weight_map"),
        ('{"weight_map": {"a": "../secret.safetensors"}}', "expected a file beside the index"),
        ('{"weight_map": {"a": 3}}', "broken|expected a file beside the index"),
        ('{"weight_map": {"a": "gone.safetensors"}}', "gone.safetensors: is missing"),
    ],
)
def test_an_index_of_shards_is_not_trusted(copy: Path, index: str, said: str) -> None:
    (copy / WEIGHTS).unlink()
    (copy / "model.safetensors.index.json").write_text(index)
    with pytest.raises(InputError, match=said):
        Base(copy)
