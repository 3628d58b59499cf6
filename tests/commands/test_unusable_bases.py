"""Bases that cannot do what is asked of them: one line that names what is wrong, exit status 2, nothing written."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from rows import write_rows
from transformers import (
    BartConfig,
    BartForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    CLIPVisionConfig,
    CLIPVisionModel,
    FunnelConfig,
    FunnelForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)
from verbs import Verbs
from worlds import (
    WORDS,
    make_base,
    make_corpus,
    make_model,
    make_outdated,
    make_roberta,
    make_task,
    make_tokenizer,
    make_upgraded,
)

PAD, SEP = 0, 3
TOKENS = {"vocab_size": 200, "pad_token_id": PAD, "bos_token_id": 2, "eos_token_id": SEP}
HEADS = {"num_attention_heads": 2, "intermediate_size": 32, "hidden_size": 16, "num_hidden_layers": 1}
TEXTS_OF_50 = {**HEADS, "vocab_size": 200, "max_position_embeddings": 50}
T5_SIZE = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": PAD}
BART_SIZE = {
    **{f"{part}_{what}": size for part in ("encoder", "decoder") for what, size in (("layers", 1), ("ffn_dim", 32))},
    **{"encoder_attention_heads": 2, "decoder_attention_heads": 2, "d_model": 16, "max_position_embeddings": 64},
}
FAMILIES: dict[str, tuple[type[PreTrainedModel], PretrainedConfig]] = {
    "gpt2": (GPT2LMHeadModel, GPT2Config(**TOKENS, n_embd=16, n_layer=1, n_head=2, n_positions=64)),
    "llama": (LlamaForCausalLM, LlamaConfig(**TOKENS, **HEADS, num_key_value_heads=2)),
    "t5": (T5ForConditionalGeneration, T5Config(**TOKENS, **T5_SIZE)),
    "bart": (BartForSequenceClassification, BartConfig(**TOKENS, **BART_SIZE, decoder_start_token_id=2)),
    "funnel": (
        FunnelForMaskedLM,
        FunnelConfig(vocab_size=200, d_model=16, n_head=2, d_head=8, d_inner=32, block_sizes=[1, 1]),
    ),
}


class World:
    """Directories that are all in order; tests copy what they spoil."""

    def __init__(self, root: Path) -> None:
        self.base, self.task = make_base(root / "base"), make_task(root / "task", train=30, dev=12, test=12)
        self.corpus = make_corpus(root / "corpus", documents=20)
        self.of = {name: make_model(root / name, kind(config)) for name, (kind, config) in FAMILIES.items()}


class Runs(Verbs):
    """Runs the command on bases that a test has spoiled."""

    def __init__(self, world: World, tmp: Path, capsys: pytest.CaptureFixture) -> None:
        super().__init__(tmp, capsys)
        self.world = world

    def changed(self, base: Path, name: str = "changed", **config: object) -> Path:
        """A copy of a base whose config says this; None takes a key out."""
        copy = Path(shutil.copytree(base, self.tmp / name))
        content = {**json.loads((copy / "config.json").read_text()), **config}
        (copy / "config.json").write_text(json.dumps({k: v for k, v in content.items() if v is not None}))
        return copy

    def without_token(self, base: Path, *kinds: str) -> Path:
        copy = self.changed(base)
        tokenizer = make_tokenizer()
        for kind in kinds:
            setattr(tokenizer, kind, None)
        tokenizer.save_pretrained(copy)
        return copy

    def tune(self, base: Path, **settings: object) -> list[object]:
        return self.training("tune", **{"base": base, "task": self.world.task, **settings})

    def pretrain(self, base: Path, **settings: object) -> list[object]:
        return self.training("pretrain", base=base, corpus={"train": str(self.world.corpus)}, **settings)

    def verbs_with_a_task(self, base: Path, task: Path | None = None) -> Iterator[list[object]]:
        """Every verb that has a base's classifier read texts; the weights are the base's own."""
        task = task or self.world.task
        weights = make_outdated(base, task, self.tmp / "weights")
        on_base = ["--weights", weights, "--base", base]
        yield self.tune(base, task=task)
        yield self.training("recycle", base=base, old_base=base, weights=weights, task=task, method="init")
        yield self.training("recycle", base=base, old_base=base, weights=weights, task=task, method="apply")
        yield ["evaluate", *on_base, "--task", task]
        yield ["probe", *on_base, "--task", task, "--out", self.out]
        yield ["apply", *on_base, "--scale", "auto", "--task", task, "--out", self.out]
        yield ["store", "similar", "--store", self.tmp / "store", "--task", task, "--base", base]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture
def runs(world: World, tmp_path: Path, capsys: pytest.CaptureFixture) -> Iterator[Runs]:
    before = dict(os.environ)
    yield Runs(world, tmp_path, capsys)
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.parametrize("family", ["bert", *FAMILIES])
def test_a_base_in_order_is_tuned(runs: Runs, family: str) -> None:
    base = runs.world.of.get(family, runs.world.base)
    assert runs.run(*runs.tune(base)) == (0, [])


# ---- padding


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_tokenizer_without_any_token_to_pad_with(runs: Runs, family: str) -> None:
    base = runs.without_token(
        runs.changed(runs.world.of[family], "nothing", pad_token_id=None), "pad_token", "unk_token"
    )
    expected = f"{base}: its tokenizer has no pad token, and no end or unknown token that could stand for one"
    for argv in runs.verbs_with_a_task(base):
        assert expected in runs.refused(*argv), argv


def test_a_text_that_ends_in_the_pad_token(runs: Runs) -> None:
    base = runs.without_token(runs.world.of["gpt2"], "pad_token")
    tokenizer = make_tokenizer(bert=False)
    tokenizer.save_pretrained(base)
    task = Path(shutil.copytree(runs.world.task, runs.tmp / "task"))
    rows = (task / "train.jsonl").read_text().splitlines()
    rows[7] = json.dumps({"text": f"{WORDS[5]} [PAD]", "label": "left"})
    (task / "train.jsonl").write_text("\n".join(rows))
    said = runs.refused(*runs.tune(base, task=task))
    assert f"{base}: 'w5 [PAD]' ends in the pad token, '[PAD]', before which GPT2ForSequenceClassification" in said


def test_pretraining_needs_no_pad_token(runs: Runs) -> None:
    assert runs.run(*runs.pretrain(runs.without_token(runs.world.base, "pad_token"))) == (0, [])


def test_a_teacher_that_would_read_padding_as_text(runs: Runs) -> None:
    """Its weights bring no pad token along, and each base's config agrees with its own tokenizer."""
    old = runs.world.of["gpt2"]
    new = make_upgraded(old, runs.tmp / "new")
    other = make_tokenizer()
    other.pad_token = WORDS[0]
    other.save_pretrained(new)
    config = json.loads((new / "config.json").read_text())
    (new / "config.json").write_text(json.dumps({**config, "pad_token_id": PAD + 5}))
    weights = make_outdated(old, runs.world.task, runs.tmp / "weights")
    settings = {"base": new, "old_base": old, "weights": weights, "task": runs.world.task, "allow_unrelated": True}
    for method in ("distill", "both"):
        said = runs.refused(*runs.training("recycle", **settings, method=method))
        assert f"{old / 'config.json'}: pad_token_id is {PAD}, expected the tokenizer's, {PAD + 5}" in said


def test_an_encoder_needs_no_pad_token_in_its_config(runs: Runs) -> None:
    base = runs.changed(runs.world.base, pad_token_id=7)
    assert runs.run(*runs.tune(base)) == (0, [])


# ---- what texts are embedded by


def test_a_tokenizer_that_tells_second_texts_from_first_on_a_base_that_does_not(runs: Runs) -> None:
    base, task = make_roberta(runs.tmp / "base"), runs.tmp / "task"
    make_tokenizer().save_pretrained(base)
    rows = [{"text": WORDS[i], "text_pair": WORDS[-i], "label": "ab"[i % 2]} for i in range(30)]
    for split in ("train", "dev", "test"):
        write_rows(task / f"{split}.jsonl", rows)
    for argv in runs.verbs_with_a_task(base, task):
        said = runs.refused(*argv)
        assert f"{base}: gives token type 1, but {base / 'config.json'} has type_vocab_size 1" in said, argv


def test_a_base_whose_positions_are_no_multiple_of_8(runs: Runs) -> None:
    base, task = make_model(runs.tmp / "base", BertForMaskedLM(BertConfig(**TEXTS_OF_50))), runs.tmp / "task"
    rows = [{"text": " ".join(WORDS[i : i + 60]), "label": "ab"[i % 2]} for i in range(30)]
    for split in ("train", "dev", "test"):
        write_rows(task / f"{split}.jsonl", rows)
    assert runs.run(*runs.tune(base, task=task, max_length=50)) == (0, [])


# ---- end tokens


@pytest.mark.parametrize(("family", "classifier"), [("t5", "T5"), ("bart", "Bart")])
def test_an_end_token_that_the_tokenizer_does_not_put(runs: Runs, family: str, classifier: str) -> None:
    base = runs.changed(runs.world.of[family], eos_token_id=1)
    expected = f"{base}: its tokenizer puts no end token (id 1, the config's eos_token_id) behind a text, which "
    for argv in runs.verbs_with_a_task(base):
        assert f"{expected}{classifier}ForSequenceClassification reads" in runs.refused(*argv), argv


def test_a_text_that_holds_an_end_token_itself(runs: Runs) -> None:
    task = Path(shutil.copytree(runs.world.task, runs.tmp / "task"))
    rows = (task / "train.jsonl").read_text().splitlines()
    rows[7] = json.dumps({"text": f"{WORDS[5]} [SEP] {WORDS[6]}", "label": "left"})
    (task / "train.jsonl").write_text("\n".join(rows))
    said = runs.refused(*runs.tune(runs.world.of["t5"], task=task))
    assert f"{runs.world.of['t5']}: 2 end tokens (id {SEP}) in '[CLS] w5 [SEP] w6 [SEP]', which T5For" in said
    assert said.endswith("expected 1 as in the others")
    assert runs.run(*runs.tune(runs.world.base, task=task)) == (0, [])  # BERT reads its first token


@pytest.mark.parametrize("found", [None, 200, "x"])
def test_a_token_that_an_encoder_decoder_reads_and_its_config_lacks(runs: Runs, found: object) -> None:
    field = "decoder_start_token_id"
    base = runs.changed(runs.world.of["t5"])
    content = {**json.loads((base / "config.json").read_text()), field: found}
    (base / "config.json").write_text(json.dumps(content))
    assert f"{base / 'config.json'}: " in (said := runs.refused(*runs.tune(base)))
    assert f"{field} is {found!r}, expected a token's id" in said or f"Validation error for field '{field}'" in said


# ---- what no verb can use


@pytest.mark.parametrize("family", ["gpt2", "llama", "t5"])
def test_pretraining_a_base_that_is_no_masked_language_model_as_one(runs: Runs, family: str) -> None:
    base = runs.world.of[family]
    said = runs.refused(*runs.pretrain(base, lm="masked"))
    assert f"{base}: is {family!r}, which has no AutoModelForMaskedLM in transformers" in said
    base = runs.without_token(base, "mask_token")
    assert f"{base}: its tokenizer has no mask token" in runs.refused(*runs.pretrain(base, lm="masked"))


def test_pretraining_as_what_a_base_is_not(runs: Runs) -> None:
    said = runs.refused(*runs.pretrain(runs.world.base, lm="causal"))
    assert f"{runs.world.base}: is 'bert', no causal language model; expected a decoder, or another lm" in said
    said = runs.refused(*runs.pretrain(runs.world.base, lm="spans"))
    assert f"{runs.world.base}: is 'bert', expected an encoder-decoder for lm: spans" in said
    t5 = runs.world.of["t5"]
    said = runs.refused(*runs.pretrain(t5, lm="causal"))
    assert f"{t5}: is 't5', no causal language model" in said
    assert f"{t5}: its tokenizer has no " in (said := runs.refused(*runs.pretrain(t5)))
    assert "(eos_token), which closes a decoder's text" in said


def test_a_base_without_a_vocabulary(runs: Runs) -> None:
    model = CLIPVisionModel(CLIPVisionConfig(**HEADS, image_size=32, patch_size=16))
    base = make_model(runs.tmp / "vision", model)
    assert "config.json: makes no model: Unrecognized configuration class" in runs.refused(*runs.tune(base))


def test_a_kind_of_model_that_has_no_backbone(runs: Runs) -> None:
    base = runs.changed(runs.world.base, model_type="trocr")
    said = runs.refused("lineage", "show", base)
    assert "config.json: model_type is 'trocr', expected a model of text" in said


@pytest.mark.parametrize(
    "config",
    [
        *({"num_attention_heads": 0}, {"hidden_act": "dance"}, {"hidden_size": 17}, {"num_hidden_layers": "two"}),
        *({"hidden_size": 1 << 40}, {"num_hidden_layers": 200_000}, {"num_hidden_layers": -1}),
        *({"num_attention_heads": -1}, {"hidden_dropout_prob": float("nan")}, {"num_labels": 1 << 40}),
    ],
)
def test_a_config_that_makes_no_model(runs: Runs, config: dict[str, object]) -> None:
    base = runs.changed(runs.world.base, **config)
    for of_verb in (runs.tune, runs.pretrain):
        assert "config.json: " in runs.refused(*of_verb(base))


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        (
            "tokenizer_config.json",
            {"model_input_names": ["pieces"]},
            "model_input_names is ['pieces'], expected",
        ),
        ("tokenizer_config.json", {"model_input_names": []}, "model_input_names is [], expected a list"),
        (
            "tokenizer.json",
            {"post_processor": None, "normalizer": {"type": "Replace", "pattern": {"Regex": "."}, "content": ""}},
            "makes no token of any text",
        ),
    ],
)
def test_a_tokenizer_of_other_inputs_or_of_no_tokens(
    runs: Runs, file: str, change: dict[str, object], said: str
) -> None:
    base = runs.changed(runs.world.base)
    (base / file).write_text(json.dumps({**json.loads((base / file).read_text()), **change}))
    assert said in runs.refused(*runs.tune(base))


def test_a_lineage_that_cannot_be_handed_on_is_refused_before_anything_is_trained(runs: Runs) -> None:
    base = runs.changed(runs.world.base)
    (base / "lineage.json").write_text('{"format": 99}')
    for of_verb in (runs.tune, runs.pretrain):
        assert "lineage.json: format 99, this version reads 1" in runs.refused(*of_verb(base))


def test_a_config_with_more_rows_than_any_weights_have(runs: Runs) -> None:
    base = runs.changed(runs.world.base, vocab_size=1 << 40)
    for of_verb in (runs.tune, runs.pretrain):
        assert "word_embeddings.weight" in runs.refused(*of_verb(base))


def test_a_base_whose_outputs_are_tuples_by_its_config(runs: Runs) -> None:
    base = runs.changed(runs.world.base, return_dict=False)
    assert runs.run(*runs.tune(base)) == (0, [])
    shutil.rmtree(runs.out)
    assert runs.run(*runs.pretrain(base)) == (0, [])
