"""Bases with heads: what is drawn fresh depends on seed and name alone, what the base has is kept."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from families import config, drawn
from safetensors.torch import load_file, save_file
from transformers import (
    AlbertConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertConfig,
    DebertaV2Config,
    DistilBertConfig,
    ElectraConfig,
    MixtralConfig,
    ModernBertConfig,
    NomicBertConfig,
    RobertaConfig,
    RobertaForMaskedLM,
)
from worlds import make_base, make_task, make_tokenizer, make_upgraded

from recyclable.carrying.places import canonical_names
from recyclable.errors import InputError
from recyclable.lm.masked import Masked
from recyclable.models.build import structure, unread
from recyclable.models.heads import head_modules, untrained_tensors
from recyclable.models.tasks import task_model
from recyclable.tasks.parts.task import Task, load_task
from recyclable.tunings.bottleneck import Bottleneck
from recyclable.tunings.lora import Lora
from recyclable.weights.base import Base
from recyclable.weights.reader import Reader
from recyclable.weights.sources import fill

HEAD = "classifier.weight"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def base(root: Path) -> Path:
    return make_base(root / "base")


@pytest.fixture(scope="module")
def headless(root: Path) -> Path:
    return make_base(root / "headless", mlm_head=False)


@pytest.fixture(scope="module")
def task(root: Path) -> Task:
    return load_task(make_task(root / "task"))


def masked_lm(folder: Path, head: str, dropout: float | None = None) -> tuple[torch.nn.Module, list[str]]:
    settings = {"base": str(folder), "corpus": "c.txt", "out": "o", "max_steps": 1, "learning_rate": 1.0}
    return Masked(**settings, mlm_head=head, dropout=dropout).model(Base(folder))


def state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in fill(model).named_parameters()}


def test_a_fresh_head_is_the_same_on_a_base_and_its_upgrade_whatever_was_drawn_before(
    base: Path, task: Task, tmp_path: Path
) -> None:
    upgraded = make_upgraded(base, tmp_path / "upgraded")
    first = state(task_model(Base(base), task, 20))
    torch.manual_seed(123)
    torch.randn(7)
    masked_lm(base, "fresh")
    second = state(task_model(Base(upgraded), task, 20))
    fresh = [name for name in first if "classifier" in name or "pooler" in name]
    assert len(fresh) == 4
    for name in fresh:
        assert torch.equal(first[name], second[name]), name
    assert not torch.equal(first["bert.embeddings.LayerNorm.bias"], second["bert.embeddings.LayerNorm.bias"])


def test_another_seed_draws_another_head_and_leaves_the_base_alone(base: Path, task: Task) -> None:
    first, second = (state(task_model(Base(base), task, seed)) for seed in (20, 30))
    for name in first:
        drawn = name in (HEAD, "bert.pooler.dense.weight")
        assert torch.equal(first[name], second[name]) is not drawn, name


def test_tensors_of_different_names_are_drawn_differently(base: Path, task: Task) -> None:
    made = state(task_model(Base(base), task, 20))
    assert not torch.equal(made["bert.pooler.dense.weight"][:3], made[HEAD])


def test_a_fresh_head_is_drawn_as_bert_draws_it(base: Path, task: Task) -> None:
    made = state(task_model(Base(base), task, 20))
    assert made["bert.pooler.dense.weight"].std().item() == pytest.approx(0.1, rel=0.1)  # initializer_range
    assert not made["classifier.bias"].any() and not made["bert.pooler.dense.bias"].any()
    fresh = fill(masked_lm(base, "fresh")[0])
    norm = fresh.cls.predictions.transform.LayerNorm
    assert (norm.weight == 1).all() and (norm.bias == 0).all()


def test_loading_leaves_torchs_own_generator_alone(base: Path, task: Task) -> None:
    torch.manual_seed(5)
    wanted = torch.randn(3)
    torch.manual_seed(5)
    made = task_model(Base(base), task, 20)
    after_model = torch.get_rng_state()
    Lora().attach(made, "SEQ_CLS", 20)
    assert torch.equal(torch.get_rng_state(), after_model)
    torch.manual_seed(5)
    assert torch.equal(torch.randn(3), wanted)


@pytest.mark.parametrize("kind", ["lora", "bottleneck"])
def test_adapters_are_the_same_for_the_same_seed_and_train_little(base: Path, task: Task, kind: str) -> None:
    def made(seed: int) -> torch.nn.Module:
        torch.manual_seed(seed * 7)
        tuning = {"lora": Lora(lora_r=2), "bottleneck": Bottleneck(bottleneck_size=2)}[kind]
        return tuning.attach(task_model(Base(base), task, 20), "SEQ_CLS", seed)

    first, again, other = (state(made(seed)) for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)
    model = made(1)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert any("classifier" in name for name in trained) and any("pooler" in name for name in trained)
    assert any("LayerNorm" in name for name in trained) is (kind == "bottleneck")
    assert not any(name.endswith("word_embeddings.weight") for name in trained)


def test_a_dropout_replaces_every_rate_and_none_keeps_the_bases(base: Path, task: Task) -> None:
    def rates(model: torch.nn.Module) -> set[float]:
        return {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)}

    assert rates(task_model(Base(base), task, 20)) == {0.1}
    assert rates(task_model(Base(base), task, 20, 0.0)) == {0.0}
    assert rates(masked_lm(base, "auto", 0.25)[0]) == {0.25}
    model = fill(task_model(Base(base), task, 20, 0.0)).train()
    ids = torch.arange(5, 15)[None]
    assert torch.equal(model(ids).logits, model(ids).logits)


def test_labels_are_written_into_the_config(base: Path, task: Task) -> None:
    config = task_model(Base(base), task, 20).config
    assert config.id2label == {0: "left", 1: "middle", 2: "right"} and config.num_labels == 3


def test_auto_keeps_a_trained_head_and_draws_one_where_there_is_none(base: Path, headless: Path) -> None:
    kept, fresh = masked_lm(base, "auto")
    assert fresh == []
    for name, tensor in load_file(base / "model.safetensors").items():
        if name in state(kept):
            assert torch.equal(state(kept)[name], tensor), name
    made, fresh = masked_lm(headless, "auto")
    assert "cls.predictions.transform.dense.weight" in fresh and all(name.startswith("cls.") for name in fresh)
    words = fill(made).bert.embeddings.word_embeddings.weight
    assert torch.equal(words, Base(headless)["embeddings.word_embeddings.weight"])
    assert made.cls.predictions.decoder.weight is words


def test_keep_insists_and_fresh_draws_anew_without_touching_the_embeddings(base: Path, headless: Path) -> None:
    assert masked_lm(base, "keep")[1] == []
    with pytest.raises(InputError, match=f"mlm_head: is 'keep', but {headless} has no trained head"):
        masked_lm(headless, "keep")
    kept, drawn = (
        state(masked_lm(base, "auto")[0]),
        state(masked_lm(base, "fresh")[0]),
    )
    changed = {name for name in kept if not torch.equal(kept[name], drawn[name])}
    assert changed == {"cls.predictions.transform.dense.weight"}  # the rest of it starts at 0 and 1 in both
    again = state(masked_lm(base, "fresh")[0])
    assert all(torch.equal(drawn[name], again[name]) for name in drawn)


def test_the_pooler_of_a_base_is_found_under_the_name_its_children_save_it_by(
    headless: Path, base: Path, tmp_path: Path
) -> None:
    assert untrained_tensors(Base(base), masked_lm(base, "auto")[0]).names == []
    found = dict(untrained_tensors(Base(headless), masked_lm(headless, "auto")[0]).items())
    assert found.keys() == {"bert.pooler.dense.weight", "bert.pooler.dense.bias"}
    whole = AutoModel.from_pretrained(headless)
    assert torch.equal(found["bert.pooler.dense.weight"], whole.pooler.dense.weight)


def test_a_bases_own_pooler_is_used_by_a_task(headless: Path, task: Task) -> None:
    made = state(task_model(Base(headless), task, 20))
    stored = load_file(headless / "model.safetensors")["pooler.dense.weight"]
    assert torch.equal(made["bert.pooler.dense.weight"], stored)


def test_roberta_has_a_dense_head_and_no_pooler(root: Path, task: Task) -> None:
    size = {"vocab_size": 200, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = RobertaConfig(**size, intermediate_size=32, max_position_embeddings=34, pad_token_id=1)
    RobertaForMaskedLM(config).save_pretrained(root / "roberta")
    make_tokenizer().save_pretrained(root / "roberta")
    model = task_model(Base(root / "roberta"), task, 20)
    assert head_modules(model) == ["classifier"]
    names = canonical_names(model)
    assert names["embeddings.word_embeddings.weight"] == "roberta.embeddings.word_embeddings.weight"
    assert {name for name in names if name not in Base(root / "roberta")} == {
        *("classifier.dense.weight", "classifier.dense.bias", "classifier.out_proj.weight", "classifier.out_proj.bias")
    }
    Reader.of(Base(root / "roberta")).require_length(32)
    with pytest.raises(InputError, match="has positions for 32 tokens at most"):
        Reader.of(Base(root / "roberta")).require_length(33)


SIZE = {"vocab_size": 99, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
SPECIAL_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "cls_token_id": 1, "eos_token_id": 2, "sep_token_id": 2}
FAMILIES = {
    "distilbert": DistilBertConfig(vocab_size=99, dim=16, n_layers=1, n_heads=2, hidden_dim=32),
    "electra": ElectraConfig(**SIZE, embedding_size=8),
    "deberta-v2": DebertaV2Config(**SIZE, relative_attention=True, pos_att_type=["p2c", "c2p"]),
    "modernbert": ModernBertConfig(**SIZE, **SPECIAL_TOKENS),
    "albert": AlbertConfig(**SIZE, embedding_size=8),
    "untied": BertConfig(**SIZE, tie_word_embeddings=False),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_is_what_from_pretrained_makes_of_the_same_files(family: str, task: Task, tmp_path: Path) -> None:
    for saved in (AutoModelForMaskedLM, AutoModel, AutoModelForSequenceClassification):
        written = saved.from_config(FAMILIES[family])
        for parameter in written.parameters():
            torch.nn.init.normal_(parameter)  # biases and norms too
        folder = tmp_path / saved.__name__
        written.save_pretrained(folder)
        for auto_class in (AutoModelForMaskedLM, AutoModelForSequenceClassification):
            labels = {} if auto_class is AutoModelForMaskedLM else {"num_labels": 3, "ignore_mismatched_sizes": True}
            whole, info = auto_class.from_pretrained(folder, output_loading_info=True, **labels)
            drawn = info["missing_keys"] | {name for name, *_ in info["mismatched_keys"]}
            if auto_class is AutoModelForMaskedLM:
                made, fresh = masked_lm(folder, "auto")
                assert set(fresh) == {name for name, _ in made.named_parameters()} & drawn
            else:
                made = task_model(Base(folder), task, 20)
            assert made.training == whole.training and made.config.to_dict().keys() == whole.config.to_dict().keys()
            expected, found = dict(whole.named_parameters()), state(made)
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[name], expected[name]) for name in found.keys() - drawn)
            buffers = dict(whole.named_buffers())
            assert all(torch.equal(buffer, buffers[name]) for name, buffer in made.named_buffers())


def test_a_family_whose_checkpoints_transformers_converts_starts_as_transformers_has_it(tmp_path: Path) -> None:
    AutoModelForMaskedLM.from_config(NomicBertConfig(**SIZE)).save_pretrained(tmp_path)
    assert any("Wqkv" in name for name in load_file(tmp_path / "model.safetensors"))
    made, fresh = masked_lm(tmp_path, "auto")
    found, plain = state(made), state(AutoModelForMaskedLM.from_pretrained(tmp_path))
    assert fresh == [] and found.keys() == plain.keys()
    assert all(torch.equal(found[name], plain[name]) for name in plain)


def test_a_model_whose_tensors_no_machine_could_hold_has_a_structure() -> None:
    sizes = {"hidden_size": 4096, "intermediate_size": 1 << 14, "num_hidden_layers": 1, "vocab_size": 100}
    model = structure(MixtralConfig(num_local_experts=1 << 20, **sizes), AutoModel)
    assert model.layers[0].mlp.experts.down_proj.shape == (1 << 20, 4096, 1 << 14)  # 280 TB
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not any(buffer.is_meta for buffer in model.buffers())


def test_files_that_hold_a_tied_tensor_twice_must_hold_the_same(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "twice")
    file = tmp_path / "twice" / "model.safetensors"
    tensors = load_file(file)
    words = tensors["bert.embeddings.word_embeddings.weight"]
    save_file({**tensors, "cls.predictions.decoder.weight": words.clone()}, file)
    made = state(masked_lm(file.parent, "auto")[0])
    assert torch.equal(made["bert.embeddings.word_embeddings.weight"], words)
    save_file({**tensors, "cls.predictions.decoder.weight": words + 1}, file)
    with pytest.raises(InputError, match="its config ties cls"):
        state(masked_lm(file.parent, "auto")[0])


def test_a_masked_lm_head_of_another_shape_is_told(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "other")
    file = tmp_path / "other" / "model.safetensors"
    save_file({**load_file(file), "cls.predictions.bias": torch.zeros(7)}, file)
    with pytest.raises(InputError, match=r"cls.predictions.bias is \(7,\), the model's is \(200,\)"):
        masked_lm(file.parent, "auto")


def test_a_classifier_of_other_labels_is_replaced_by_a_fresh_one(base: Path, task: Task, tmp_path: Path) -> None:
    fill(task_model(Base(base), task, 20)).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({**tensors, HEAD: torch.ones(7, 32)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    made, fresh = (state(task_model(Base(folder), task, 30)) for folder in (tmp_path, base))
    assert torch.equal(made[HEAD], fresh[HEAD])


def test_a_module_that_an_adapter_cannot_attach_to_is_named(base: Path, task: Task) -> None:
    tuning = Lora(target_modules=["no_such_module"])
    with pytest.raises(InputError, match=r"target_modules: .*no_such_module"):
        tuning.attach(task_model(Base(base), task, 20), "SEQ_CLS", 20)


@pytest.mark.parametrize("problem", ["generation", "choice"])
def test_an_encoder_answers_no_prompts_though_it_has_a_causal_class(problem: str, base: Path) -> None:
    with pytest.raises(InputError, match=r"is an encoder \(bert\), which generates no text: expected a decoder or enc"):
        task_model(Base(base), Task("t", problem, (), {}, ""), 20)


@pytest.mark.parametrize("family", ["bert", "distilbert", "albert"])
def test_feed_forward_chunks_that_do_not_divide_the_length_are_not_made(family: str, tmp_path: Path) -> None:
    ids = torch.tensor([[5, 6, 7, 8, 9, 10, 11]])
    wanted = drawn(config(family), AutoModelForMaskedLM)
    wanted.save_pretrained(tmp_path)
    config(family, chunk_size_feed_forward=3).save_pretrained(tmp_path)
    base = Base(tmp_path)
    model, *_ = unread(AutoModelForMaskedLM, base, base.config)
    assert torch.equal(fill(model)(input_ids=ids).logits, wanted(input_ids=ids).logits)
    assert model.config.chunk_size_feed_forward == 3  # what is saved says what the base said
