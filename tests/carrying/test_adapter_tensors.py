"""Adapters that hold values of the base's own tensors, or entries per token, against plain peft and sums by hand."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import (
    TRAINED,
    answers,
    full_value_kinds,
    ids_of,
    lora,
    make_peft,
    peft_answers,
    plain,
    rearranged,
    taken_in,
    trained,
)
from peft import LoraConfig, OFTConfig, PeftModel, TaskType, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel
from worlds import WORDS, make_base, make_model, make_task, make_tokenizer, make_upgraded

from recyclable.carrying.carried import Carried
from recyclable.carrying.changes import FoundChanges
from recyclable.errors import InputError
from recyclable.models.tasks import outdated_model
from recyclable.recipes.apply import PROVENANCE, apply
from recyclable.recipes.lineage import declare
from recyclable.tasks.parts.task import load_task
from recyclable.weights.adapted import write_manifest
from recyclable.weights.manifest import ADAPTER, ADAPTER_CONFIG, read_manifest
from recyclable.weights.sources import fill

KINDS = full_value_kinds()
TEXTS = [["w1", "w20", "w33", "w4", "w90", "w61"], ["w2", "w4", "w7", "w150", "w33", "w1"]]
SHUFFLED = random.Random(0).sample(WORDS, len(WORDS))
GROWN = ["extra", *[word for word in SHUFFLED if word not in ("w77", "w180")], "one", "two"]
SAME = FoundChanges()


class World:
    """A base with a pooler, its upgrade, both with their vocabularies rearranged, and adapters of every kind."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.task = folder, make_task(folder / "task")
        self.base = make_base(folder / "base", mlm_head=False)
        plain(self.base).save_pretrained(self.base)  # with a head, which a file of rows alone does not have
        self.upgraded = make_upgraded(self.base, folder / "upgraded")
        self.bases = {"own": self.base, "upgrade": self.upgraded}
        for name, of in (("own", self.base), ("upgrade", self.upgraded)):
            for how, words in (("shuffled", SHUFFLED), ("grown", GROWN)):
                self.bases[f"{name}-{how}"] = rearranged(of, folder / f"{name}-{how}", words, self.base)

    def tuned(self, kind: str) -> Path:
        """What plain peft saved."""
        folder = self.folder / "peft" / kind
        return folder if folder.exists() else make_peft(self.base, KINDS[kind], folder)

    def weights(self, kind: str) -> Path:
        """The same as adapted weights."""
        folder = self.folder / "weights" / kind
        return folder if folder.exists() else taken_in(self.tuned(kind), self.base, self.task, folder)

    def moved_by_hand(self, kind: str) -> Path:
        """The adapter on the upgrade, by hand: new + (tuned - old) for what the base has."""
        folder, tuned = self.folder / "by-hand" / kind, self.tuned(kind)
        if folder.exists():
            return folder
        old, new = (plain(base).state_dict() for base in (self.base, self.upgraded))
        saved, moved = load_file(tuned / ADAPTER), {}
        for name, tensor in saved.items():
            own = name.removeprefix("base_model.model.")
            for inside in ("base_layer.", "ln_tuning_layers.", "token_adapter."):
                own = own.replace(inside, "")
            before, after = (of.get(own.replace("trainable_tokens_delta", "weight")) for of in (old, new))
            if "trainable_tokens_delta" in own:
                before, after = before[TRAINED], after[TRAINED]
            heads = before is None or "classifier" in own or "pooler" in own
            moved[name] = tensor if heads else after + (tensor - before)
        folder.mkdir(parents=True)
        save_file(moved, folder / ADAPTER, metadata={"format": "pt"})
        (folder / ADAPTER_CONFIG).write_text((tuned / ADAPTER_CONFIG).read_text())
        return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("adapters"))


def in_a_model(world: World, weights: Path, base: Path) -> torch.nn.Module:
    """The model that `evaluate` and `recycle` make."""
    return fill(outdated_model(Carried.open(weights, world.base, base), load_task(world.task), 20))


@pytest.mark.parametrize("kind", KINDS)
def test_on_its_own_base_an_adapter_is_its_file_bit_for_bit(world: World, kind: str, tmp_path: Path) -> None:
    apply([world.weights(kind)], world.base, tmp_path / "out", SAME)
    found, wanted = load_file(tmp_path / "out" / ADAPTER), load_file(world.tuned(kind) / ADAPTER)
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    ids = ids_of(TEXTS)
    wanted_answers = peft_answers(world.base, world.tuned(kind), ids)
    assert torch.equal(answers(in_a_model(world, world.weights(kind), world.base), ids), wanted_answers)


@pytest.mark.parametrize("base", ["upgrade", "own-shuffled", "own-grown", "upgrade-shuffled", "upgrade-grown"])
@pytest.mark.parametrize("kind", KINDS)
def test_full_values_move_with_the_base_and_rows_with_their_tokens(
    world: World, kind: str, base: str, tmp_path: Path
) -> None:
    """Right is plain peft, for the same words, before the rows were rearranged."""
    if kind == "words-dora" and "grown" in base:
        pytest.skip("DoRA's norms are over all words: others came")
    how, _, vocabulary = base.partition("-")
    order = {"": WORDS, "shuffled": SHUFFLED, "grown": GROWN}[vocabulary]
    unmoved = (world.upgraded, world.moved_by_hand(kind)) if how == "upgrade" else (world.base, world.tuned(kind))
    wanted, ids = peft_answers(*unmoved, ids_of(TEXTS)), ids_of(TEXTS, order)
    apply([world.weights(kind)], world.bases[base], tmp_path / "out", SAME)
    found = peft_answers(world.bases[base], tmp_path / "out", ids)
    assert torch.allclose(found, wanted, atol=1e-5), (found - wanted).abs().max()
    inside = answers(in_a_model(world, world.weights(kind), world.bases[base]), ids)
    assert torch.allclose(inside, wanted, atol=1e-5), (inside - wanted).abs().max()
    if how == "upgrade" and kind not in ("words-lora", "words-dora") and vocabulary != "grown":
        without = peft_answers(world.bases[base], world.tuned(kind), ids)
        assert not torch.allclose(without, wanted, atol=1e-3), "the file as it was would have done"


def test_words_that_came_have_the_new_bases_rows_and_those_that_went_are_gone(world: World, tmp_path: Path) -> None:
    base = world.bases["upgrade-grown"]
    apply([world.weights("words")], base, tmp_path / "words", SAME)
    apply([world.weights("words-lora")], base, tmp_path / "lora", SAME)
    name = "embeddings.word_embeddings"
    rows = load_file(base / "model.safetensors")[f"bert.{name}.weight"]
    found = load_file(tmp_path / "words" / ADAPTER)[f"base_model.model.bert.{name}.weight"]
    factors = load_file(tmp_path / "lora" / ADAPTER)[f"base_model.model.bert.{name}.lora_embedding_A"]
    new = [5 + GROWN.index(word) for word in ("extra", "one", "two")]
    assert found.shape == rows.shape and factors.shape == (4, len(rows))
    assert torch.equal(found[new], rows[new]) and not factors[:, new].any() and factors[:, 5 + GROWN.index("w1")].any()


def test_what_moved_is_told_and_recorded(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for kind, told in (("rows", True), ("norms", False)):
        apply([world.weights(kind)], world.bases["own-grown"], tmp_path / kind, SAME)
        said = "rows aligned by token; new tokens: 3 (extra, one, two); dropped tokens: 2 (w77, w180)"
        assert (said in capsys.readouterr().out) == told
        record = json.loads((tmp_path / kind / PROVENANCE).read_text())
        assert ("vocabulary" in record) == told
    config = json.loads((tmp_path / "rows" / ADAPTER_CONFIG).read_text())
    assert config["token_indices"] == [5 + GROWN.index(word) for word in ("w1", "w20", "w33", "w4")]


def test_only_rows_of_tokens_get_other_indices(world: World, tmp_path: Path) -> None:
    apply([world.weights("rows-of-two")], world.bases["own-shuffled"], tmp_path / "out", SAME)
    indices = json.loads((tmp_path / "out" / ADAPTER_CONFIG).read_text())["trainable_token_indices"]
    moved = [5 + SHUFFLED.index(word) for word in ("w1", "w20", "w33", "w4")]
    assert indices == {"word_embeddings": moved, "position_embeddings": TRAINED}


def test_a_trained_token_that_the_new_vocabulary_lacks_is_named(world: World, tmp_path: Path) -> None:
    words = [word for word in SHUFFLED if word != "w20"]
    without = rearranged(world.base, tmp_path / "without", words, world.base)
    with pytest.raises(InputError, match="trained token 'w20', which the new vocabulary lacks"):
        apply([world.weights("rows")], without, tmp_path / "out", SAME)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("indices", "problem"),
    [
        ([6, 25, 38, 200], "names row 200 of embeddings.word_embeddings.weight, which has 200"),
        ([6, 25, 38], r"names the rows \[6, 25, 38\] .*, expected a list of the 4"),
    ],
)
def test_indices_that_cannot_be_are_refused(world: World, tmp_path: Path, indices: list[int], problem: str) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in (ADAPTER, ADAPTER_CONFIG, "manifest.json"):
        (broken / file).write_bytes((world.weights("rows") / file).read_bytes())
    config: dict[str, Any] = json.loads((broken / ADAPTER_CONFIG).read_text())
    (broken / ADAPTER_CONFIG).write_text(json.dumps({**config, "token_indices": indices}))
    write_manifest(broken, read_manifest(broken))
    with pytest.raises(InputError, match=problem):
        apply([broken], world.upgraded, tmp_path / "out", SAME)


def test_an_embedding_changed_in_no_way_by_token_stays_on_its_vocabulary(world: World, tmp_path: Path) -> None:
    config = OFTConfig(
        task_type=TaskType.SEQ_CLS,
        r=0,
        oft_block_size=4,
        target_modules=["word_embeddings"],
        modules_to_save=["classifier", "pooler"],
    )
    weights = taken_in(make_peft(world.base, config, tmp_path / "oft"), world.base, world.task, tmp_path / "weights")
    apply([weights], world.upgraded, tmp_path / "out", SAME)
    with pytest.raises(InputError, match="in a way that cannot follow tokens to other rows"):
        apply([weights], world.bases["own-shuffled"], tmp_path / "no", SAME)


def test_weights_that_read_with_a_tokenizer_of_their_own_keep_their_rows(world: World, tmp_path: Path) -> None:
    folder = make_peft(world.base, lora(), tmp_path / "peft")
    own = make_tokenizer([f"W{word[1:]}" for word in WORDS])
    own.save_pretrained(folder)
    weights = taken_in(folder, world.base, world.task, tmp_path / "weights")
    assert read_manifest(weights).tokenizer is not None
    apply([weights], world.upgraded, tmp_path / "out", SAME)
    with pytest.raises(InputError, match="reads with a tokenizer of its own, which has them in the old rows"):
        apply([weights], world.bases["own-shuffled"], tmp_path / "no", SAME)


def test_a_plain_base_says_the_same_whatever_the_order_of_its_words(world: World) -> None:
    for name, order in (("own-shuffled", SHUFFLED), ("own-grown", GROWN)):
        wanted, found = (
            answers(plain(base), ids)
            for base, ids in ((world.base, ids_of(TEXTS)), (world.bases[name], ids_of(TEXTS, order)))
        )
        assert torch.allclose(found, wanted, atol=1e-6)


OF_A_DECODER = {
    "embedding-lora": {"target_modules": ["c_attn", "wte"]},
    "head-lora": {"target_modules": ["c_attn", "lm_head"]},
    "head": {"target_modules": ["c_attn"], "modules_to_save": ["lm_head"]},
    "rows": {"target_modules": ["c_attn"], "trainable_token_indices": TRAINED},
}


@pytest.mark.parametrize("kind", OF_A_DECODER)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_output_embeddings_follow_their_tokens_too(tmp_path: Path, kind: str, tied: bool) -> None:
    config = GPT2Config(
        vocab_size=200, n_embd=32, n_layer=1, n_head=2, initializer_range=0.1, tie_word_embeddings=tied, pad_token_id=0
    )
    base = make_model(tmp_path / "base", GPT2LMHeadModel(config))
    upgraded = rearranged(base, tmp_path / "upgraded", WORDS[::-1], base)
    opened = [GPT2LMHeadModel.from_pretrained(folder) for folder in (base, base, upgraded)]
    settings = LoraConfig(task_type=TaskType.CAUSAL_LM, r=4, **OF_A_DECODER[kind])
    tuned, file = trained(get_peft_model(opened[0], settings)), tmp_path / "tuned"
    tuned.save_pretrained(file)
    apply([taken_in(file, base, None, tmp_path / "weights")], upgraded, tmp_path / "out", SAME)
    wanted, ids = answers(tuned, ids_of(TEXTS)), ids_of(TEXTS, WORDS[::-1])
    found = answers(PeftModel.from_pretrained(opened[2], tmp_path / "out"), ids)
    assert torch.allclose(torch.cat([found[..., :5], found[..., 5:].flip(-1)], -1), wanted, atol=1e-5)
    assert not torch.allclose(answers(opened[1], ids_of(TEXTS)), wanted, atol=0.1)


@pytest.mark.parametrize("own_tokenizer", [False, True], ids=["the-bases-tokenizer", "its-own"])
@pytest.mark.parametrize("kind", ["words", "words-lora", "rows-beside"])
def test_an_upgrade_with_rows_for_no_token_has_the_others_where_they_were(
    world: World, kind: str, own_tokenizer: bool, tmp_path: Path
) -> None:
    padded = rearranged(world.upgraded, tmp_path / "padded", [*WORDS, *(f"none{row}" for row in range(56))], world.base)
    make_tokenizer().save_pretrained(padded)  # 256 rows, 200 tokens
    (padded / "lineage.json").unlink()
    declare(str(padded), str(world.base))
    weights = world.weights(kind)
    if own_tokenizer:
        tuned = tmp_path / "tuned"
        shutil.copytree(world.tuned(kind), tuned)
        make_tokenizer([f"W{word[1:]}" for word in WORDS]).save_pretrained(tuned)
        weights = taken_in(tuned, world.base, world.task, tmp_path / "weights")
    apply([weights], padded, tmp_path / "out", SAME)
    wanted = peft_answers(world.upgraded, world.moved_by_hand(kind), ids_of(TEXTS))
    assert torch.allclose(peft_answers(padded, tmp_path / "out", ids_of(TEXTS)), wanted, atol=1e-5)
