"""Kinds of adapters beyond their logits: whether they do anything, trained on and saved, prompts before a text."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import peft_kinds
import pytest
import torch
from peft_kinds import BUILDABLE, plain, reopened
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer
from worlds import LABELS, make_base, make_tagged_task, make_task, make_upgraded, rewrite_rows

from recyclable.api import Store, carry, evaluate, recycle
from recyclable.errors import InputError
from recyclable.tasks.parts.task import load_task
from recyclable.weights.manifest import read_manifest

IDS = torch.randint(5, 200, (4, 12), generator=torch.Generator().manual_seed(1))
TAGS = ("O", "B-PER", "I-PER")
TRAINED_ON = (
    *("LORA, DoRA", "LORA, bias all", "LORA, token indices", "ADALORA, pruned", "SHIRA", "VERA", "TINYLORA"),
    *("UNILORA, saved", "LN_TUNING", "P_TUNING, LSTM", "PREFIX_TUNING, projected", "CARTRIDGE"),
)
DRAWN = {"DEFT", "HRA"}
"""Whose fresh tensors are all random and cancel out: nothing tells them from trained ones."""
FRESH_AS_WELL = [f"LORA, {setting}" for setting in ("DoRA", "bias all", "on embeddings", "token indices")]


@dataclass
class World:
    root: Path
    base: Path
    upgraded: Path
    task: Path
    store: Store

    def add(self, kind: str, **told: object) -> Path:
        """Make and add an adapter; the entry's directory."""
        peft_kinds.make(kind, self.base, self.root / kind)
        name = kind.replace(", ", "-").replace(" ", "-")
        self.store.add(name, self.root / kind, str(self.base), labels=LABELS, **told)
        return self.store.path(name)


@pytest.fixture
def world(tmp_path: Path) -> World:
    base = make_base(tmp_path / "base", mlm_head=False)
    task = make_task(tmp_path / "task", train=24, dev=6, test=6)
    return World(tmp_path, base, make_upgraded(base, tmp_path / "up"), task, Store(tmp_path / "store"))


def test_an_adapter_is_refused_exactly_where_it_does_nothing(tmp_path: Path) -> None:
    base, store = make_base(tmp_path / "base", mlm_head=False), Store(tmp_path / "store")
    bare = plain(base, "FEATURE_EXTRACTION")(input_ids=IDS).last_hidden_state
    wrong = {}
    for kind in [kind for kind in BUILDABLE if "," not in kind and kind not in DRAWN] + FRESH_AS_WELL:
        for shift in (0.0, 0.1):
            folder = tmp_path / kind / str(shift)
            peft_kinds.make(kind, base, folder, "FEATURE_EXTRACTION", shift)
            try:
                store.add(f"n{len(store.names())}", folder, str(base))
                said = "does something"
            except InputError as error:
                said = str(error)
                if "changes no output" not in said:
                    continue  # other tests have these
            found = reopened(base, folder, "FEATURE_EXTRACTION")(input_ids=IDS).last_hidden_state[:, -IDS.shape[1] :]
            acts = bool((found - bare).abs().max() > 1e-6)
            if acts != (said == "does something"):
                wrong[kind, shift] = said
    assert not wrong


@pytest.mark.parametrize("kind", TRAINED_ON)
def test_what_was_trained_on_and_saved_opens_in_plain_peft(world: World, kind: str) -> None:
    weights, out = world.add(kind), world.root / "out"
    told = {"weights": str(weights), "old_base": str(world.base), "base": str(world.upgraded), "task": str(world.task)}
    steps = {"max_steps": 2, "learning_rate": 1e-2, "train_batch_size": 8, "save_every": 0}
    recycle(method="scratch", out=str(out), **told, **steps)  # of the same kind; its own start would be its best step
    with torch.no_grad():
        ours = carry(out, world.upgraded)(input_ids=IDS).logits
        theirs = reopened(world.upgraded, out)(input_ids=IDS).logits
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (weights, out))
    used = {name: tensor.shape for name, tensor in before.items() if "original_module" not in name}
    assert used == {name: tensor.shape for name, tensor in after.items()}


def test_what_takes_no_step_is_refused_before_a_run_begins(world: World) -> None:
    told = {"old_base": str(world.base), "base": str(world.upgraded), "task": str(world.task)}
    steps = {"max_steps": 1, "learning_rate": 1e-3, "train_batch_size": 8, "out": str(world.root / "out")}
    with pytest.raises(InputError, match="cannot be trained further"):
        recycle(method="init", weights=str(world.add("VBLORA, top k")), **told, **steps)
    with pytest.raises(InputError, match="vera_lambda_b cannot be interpolated: ParameterDict"):
        recycle(method="interpolate", weights=str(world.add("VERA")), **told, **steps)
    assert not (world.root / "out").exists()


@pytest.mark.parametrize("kind", ["PROMPT_TUNING", "PREFIX_TUNING"])
def test_prompts_leave_a_text_fewer_positions(world: World, kind: str) -> None:
    rewrite_rows(world.task, lambda row: row.update(text=" ".join([row["text"]] * 30)))
    with pytest.raises(InputError, match=r"max_length: is 61, but .* has positions for 60 tokens at most beside 4 of"):
        world.add(kind, max_length=61)
    weights = world.store.add("n", world.root / kind, str(world.base), labels=LABELS) and world.store.path("n")
    assert read_manifest(weights).settings["max_length"] == 60
    assert 0 <= evaluate(weights, str(world.base), str(world.task))["runs"][0]["test_accuracy"] <= 1
    assert not [row for row in world.store.similar(str(world.task), str(world.base), 4) if "left_out" in row]


SCORED = ("P_TUNING", "P_TUNING, LSTM", "PREFIX_TUNING, projected", "LN_TUNING", "ADALORA", "VBLORA", "DELORA")


@pytest.mark.parametrize("kind", [*SCORED, "SHIRA", "RANDLORA", "LORA, token indices", "LORA, bias all"])
def test_texts_are_scored_as_plain_peft_scores_them(world: World, kind: str) -> None:
    """Each text has the label that plain peft gives it, so the right score is 1 by construction."""
    peft_kinds.make(kind, world.base, world.root / kind, shift=0.5)
    tokenizer, file = AutoTokenizer.from_pretrained(world.base), world.root / kind / "adapter_model.safetensors"

    def logits(text: str, model: torch.nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return model(**tokenizer(text, return_tensors="pt")).logits[0]

    saved, model = load_file(file), reopened(world.base, world.root / kind)
    given = [json.loads(line)["text"] for line in (world.task / "train.jsonl").open()]
    mean = torch.stack([logits(text, model) for text in given]).mean(0)
    for name in (name for name in saved if name.endswith(("classifier.bias", "classifier.modules_to_save.bias"))):
        saved[name] -= mean  # else it says the same of all; with every bias peft saves this one twice
    save_file(saved, file, metadata={"format": "pt"})
    model = reopened(world.base, world.root / kind)

    def relabelled(row: dict[str, str]) -> None:
        row["label"] = LABELS[int(logits(row["text"], model).argmax())]

    rewrite_rows(world.task, relabelled)
    (world.task / "task.yaml").write_text(f"train: train.jsonl\ntest: test.jsonl\nlabels: [{', '.join(LABELS)}]\n")
    world.store.add("n", world.root / kind, str(world.base), task=str(world.task))
    found = evaluate("n", str(world.base), str(world.task), store=world.root / "store", split="train")
    assert found["runs"][0]["train_accuracy"] == 1
    assert len({row["label"] for row in map(json.loads, (world.task / "train.jsonl").open())}) > 1


@pytest.mark.parametrize("kind", ["PROMPT_TUNING", "PREFIX_TUNING", "VERA"])
def test_words_are_tagged_as_plain_peft_tags_them(tmp_path: Path, kind: str) -> None:
    base = make_base(tmp_path / "base", mlm_head=False)
    task = make_tagged_task(tmp_path / "task", types=("PER",), train=6, dev=6, test=40)
    peft_kinds.make(kind, base, tmp_path / "a", "TOKEN_CLS", 0.5)
    Store(tmp_path / "store").add("n", tmp_path / "a", str(base), task=str(task), labels=TAGS)
    found = evaluate("n", str(base), str(task), store=tmp_path / "store")["runs"][0]["test_accuracy"]
    model, tokenizer, right = reopened(base, tmp_path / "a", "TOKEN_CLS"), AutoTokenizer.from_pretrained(base), []
    split = load_task(task).splits["test"]
    names = load_task(task).labels
    for words, tags in zip(split.texts, split.labels, strict=True):
        encoded = tokenizer(words, is_split_into_words=True, return_tensors="pt")
        with torch.no_grad():
            logits = model(**encoded).logits[0]
        logits = logits[len(logits) - encoded.input_ids.shape[1] :]
        first = [encoded.word_ids().index(word) for word in range(len(words))]
        right += [TAGS[int(logits[place].argmax())] == names[tag] for place, tag in zip(first, tags, strict=True)]
    assert found == pytest.approx(np.mean(right))
    assert 0.05 < found < 0.95, "neither all nor nothing"
