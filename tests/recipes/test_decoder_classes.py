"""Classes of texts on decoders and encoder-decoders, end to end, beside plain transformers with one text at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from decoders import END, PAD, SEQ2SEQ, decoder_tokenizer, make_decoder
from processes import scalars
from safetensors.torch import load_file, save_file
from this_process import own_environment
from torch.nn import functional as F
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedModel,
    pipeline,
)
from worlds import LABELS, make_labels_task, make_tagged_task, make_task, make_upgraded, rewrite_rows

from recyclable.api import Store, carry, carry_tokenizer, evaluate, recycle, tune
from recyclable.data.order import Order
from recyclable.errors import InputError
from recyclable.models.tasks import task_model
from recyclable.tasks.parts.task import load_task
from recyclable.weights.adapted import AdaptedWeights, write_manifest
from recyclable.weights.base import Base
from recyclable.weights.checkpoint_files import SafetensorsFile
from recyclable.weights.delta import Codec, write_delta
from recyclable.weights.manifest import DELTA, read_manifest
from recyclable.weights.sources import fill

FAMILIES = ["gpt2", "opt", "gpt_neox", "llama", "mistral", "qwen3", "gemma2", "gemma3_text", "t5", "bart"]
STEPS: dict[str, Any] = {"max_steps": 2, "learning_rate": 1e-2, "train_batch_size": 8, "save_every": 0, "seed": 5}
LENGTH = 24


class World:
    """A task, and bases of every family whose tokenizers have no pad token and pad on the left."""

    def __init__(self, root: Path) -> None:
        self.root, self.store = root, Store(root / "store")
        self.task = make_task(root / "task", train=24, dev=12, test=12)
        self.texts = [json.loads(line)["text"] for line in (self.task / "test.jsonl").open()]
        self.texts += ["w7", " ".join(f"w{i}" for i in range(40, 60))]

    def base(self, family: str) -> Path:
        folder = self.root / family
        return folder if folder.exists() else make_decoder(folder, family)

    def up(self, family: str) -> Path:
        folder = self.root / f"{family}-up"
        return folder if folder.exists() else make_upgraded(self.base(family), folder)

    def tuned(self, family: str, tuning: str = "full", task: Path | None = None, **settings: Any) -> Path:
        out = self.root / f"{family}-{tuning}-{(task or self.task).name}"
        if not out.exists():
            told = {"base": str(self.base(family)), "task": str(task or self.task), "out": str(out), "tuning": tuning}
            tune(**told, max_length=LENGTH, **STEPS, **settings)
        return out


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with own_environment():
        yield World(tmp_path_factory.mktemp("world"))


def alone(model: PreTrainedModel, texts: list[str], family: str) -> torch.Tensor:
    """Logits of each text by itself, unpadded, of a model that knows of no pad token."""
    model.config.pad_token_id = PAD if family in SEQ2SEQ else None
    tokenizer = decoder_tokenizer(family)
    with torch.no_grad():
        inputs = [tokenizer(text, truncation=True, max_length=LENGTH, return_tensors="pt") for text in texts]
        return torch.cat([model(**one).logits for one in inputs])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_merged_model_scores_in_a_plain_pipeline_as_each_text_alone(world: World, family: str) -> None:
    weights, out = world.tuned(family), world.root / f"{family}-merged"
    recorded = read_manifest(weights).config
    assert recorded == ({} if family in SEQ2SEQ else {"pad_token_id": END})
    world.store.add(family, weights, str(world.base(family)))
    world.store.export(family, str(world.base(family)), out, merged=True)
    opened = AutoModelForSequenceClassification.from_pretrained(out).eval()
    logits = alone(AutoModelForSequenceClassification.from_pretrained(out).eval(), world.texts, family)
    scored = pipeline("text-classification", model=opened, tokenizer=AutoTokenizer.from_pretrained(out))
    found = scored(world.texts, batch_size=5, top_k=None, truncation=True, max_length=LENGTH)
    names = [LABELS[i] for i in range(3)] if opened.config.id2label[0] in LABELS else ["LABEL_0", "LABEL_1", "LABEL_2"]
    scores = torch.tensor([[next(o["score"] for o in row if o["label"] == n) for n in names] for row in found])
    order = [opened.config.label2id[name] for name in names]
    torch.testing.assert_close(scores, logits.softmax(-1)[:, order], rtol=1e-4, atol=1e-5)
    assert logits.std(0).min() > 1e-3, "it says other things of other texts"
    ours, tokenizer = carry(weights, world.base(family)), carry_tokenizer(weights, world.base(family))
    with torch.no_grad():
        told = ours(**tokenizer(world.texts, padding=True, truncation=True, return_tensors="pt")).logits
    torch.testing.assert_close(told, logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "llama", "t5"])
@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_weights_are_recycled_by_every_way_and_evaluate_agrees(world: World, family: str, tuning: str) -> None:
    weights = world.tuned(family, tuning)
    told = {"weights": str(weights), "old_base": str(world.base(family)), "base": str(world.up(family))}
    for method in ("init", "distill", "both", "interpolate", "apply"):
        out = world.root / f"{weights.name}-{method}"
        steps = {} if method == "apply" else STEPS
        found = recycle(method=method, task=str(world.task), out=str(out), **told, **steps)
        scored = evaluate(out, str(world.up(family)), str(world.task))["runs"][0]
        assert {f"test_{name}": value for name, value in found["test"].items()}.items() <= scored.items()
        assert read_manifest(out).config == read_manifest(weights).config
    exported = world.root / f"{weights.name}-exported"
    world.store.add(f"{weights.name}-r", world.root / f"{weights.name}-init", None)
    world.store.export(f"{weights.name}-r", str(world.up(family)), exported, merged=True)
    model = AutoModelForSequenceClassification.from_pretrained(exported).eval()
    with torch.no_grad():
        one = carry(world.root / f"{weights.name}-init", world.up(family))
        wanted = alone(one, world.texts, family)
    torch.testing.assert_close(alone(model, world.texts, family), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3", "gemma3_text", "t5"])
def test_training_is_that_of_a_plain_loop_over_texts_one_by_one(world: World, family: str) -> None:
    out, steps = world.root / f"{family}-loop", {**STEPS, "max_steps": 3, "lr_scheduler_type": "constant"}
    told = {"base": str(world.base(family)), "task": str(world.task), "out": str(out), "max_length": LENGTH}
    tune(**told, **steps, weight_decay=0.0, max_grad_norm=0.0, dropout=0.0, log_every=1, eval_every=3)
    task, tokenizer = load_task(str(world.task)), decoder_tokenizer(family)
    model = fill(task_model(Base(world.base(family)), task, STEPS["seed"], 0.0))  # its head is drawn the same
    model.config.pad_token_id = PAD if family in SEQ2SEQ else None
    split, losses = task.splits["train"], []
    order = Order(len(split), STEPS["train_batch_size"], STEPS["seed"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=STEPS["learning_rate"], weight_decay=0.0)
    for step in range(3):
        each = []
        for _, row in order.step(step):
            text = tokenizer(split.texts[row], truncation=True, max_length=LENGTH, return_tensors="pt")
            each.append(F.cross_entropy(model(**text).logits, torch.tensor([split.labels[row]])))
        loss = torch.stack(each).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert scalars(out, "train/loss") == pytest.approx(losses, rel=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama", "gemma2", "t5"])
def test_words_are_tagged_as_in_each_text_alone(world: World, family: str) -> None:
    task = world.root / "tagged"
    task = task if task.exists() else make_tagged_task(task, types=("PER",), train=12, dev=12, test=12)
    weights, out = world.tuned(family, task=task), world.root / f"{family}-tagged-merged"
    world.store.add(f"{family}-t", weights, str(world.base(family)))
    world.store.export(f"{family}-t", str(world.base(family)), out, merged=True)
    model, tokenizer = AutoModelForTokenClassification.from_pretrained(out).eval(), decoder_tokenizer(family)
    labelled, right = load_task(str(task)), []
    split = labelled.splits["test"]
    for words, tags in zip(split.texts, split.labels, strict=True):
        encoded = tokenizer(words, is_split_into_words=True, truncation=True, max_length=LENGTH, return_tensors="pt")
        with torch.no_grad():
            told = model(**encoded).logits[0].argmax(-1)
        seen, ids = model.config.id2label, encoded.word_ids()
        found = [seen[int(told[ids.index(word)])] if word in ids else "O" for word in range(len(words))]
        right += [one == labelled.labels[tag] for one, tag in zip(found, tags, strict=True)]
    scored = evaluate(weights, str(world.base(family)), str(task))["runs"][0]
    assert scored["test_accuracy"] == pytest.approx(sum(right) / len(right))
    assert AutoTokenizer.from_pretrained(out).pad_token is not None


@pytest.mark.parametrize("family", ["gpt2", "llama", "bart"])
@pytest.mark.parametrize("kind", ["regression", "multi_label"])
def test_numbers_and_sets_of_labels_are_read_from_the_last_token_too(world: World, family: str, kind: str) -> None:
    task = world.root / kind
    if not task.exists():
        make_labels_task(task, train=24, dev=12, test=12)
        if kind == "regression":
            rewrite_rows(task, lambda row: row.update(label=len(row["label"]) + 0.5))
    weights = world.tuned(family, task=task)
    assert read_manifest(weights).task["problem"] == kind
    model, tokenizer = carry(weights, world.base(family)), carry_tokenizer(weights, world.base(family))
    with torch.no_grad():
        told = model(**tokenizer(world.texts, padding=True, truncation=True, return_tensors="pt")).logits
    torch.testing.assert_close(told, alone(model, world.texts, family), rtol=1e-4, atol=1e-5)
    evaluate(weights, str(world.base(family)), str(task))


@pytest.mark.parametrize("tuning", ["prompt", "prefix", "ia3", "bottleneck", "bias"])
def test_every_kind_of_tuning_goes_through_all_verbs(world: World, tuning: str) -> None:
    settings = {"num_virtual_tokens": 3} if tuning in ("prompt", "prefix") else {}
    weights = world.tuned("gpt2", tuning, **settings)
    told = {"weights": str(weights), "old_base": str(world.base("gpt2")), "base": str(world.up("gpt2"))}
    for method in ("scratch", "both", "apply"):
        out = world.root / f"{weights.name}-{method}"
        found = recycle(
            method=method, task=str(world.task), out=str(out), **told, **({} if method == "apply" else STEPS)
        )
        scored = evaluate(out, str(world.up("gpt2")), str(world.task))["runs"][0]
        assert {f"test_{name}": value for name, value in found["test"].items()}.items() <= scored.items()
    assert {manifest.kind for manifest in (read_manifest(weights), read_manifest(out))} == {
        "partial" if tuning == "bias" else "adapter"
    }


def test_biases_alone_stay_alone_however_often_they_are_recycled(world: World) -> None:
    weights, base = world.root / "b", Base(world.base("gpt2"))
    shutil.copytree(world.tuned("gpt2", "bias"), weights)
    biases = {name: base[name] + 0.1 for name in base.names if name.endswith(".bias")}
    save_file(biases, world.root / "biases.safetensors")
    tuned = SafetensorsFile(world.root / "biases.safetensors")
    write_delta(weights / DELTA, tuned, base, Codec(), untouched=set(base.names) - biases.keys())
    write_manifest(weights, read_manifest(weights))
    told = {"old_base": str(world.base("gpt2")), "base": str(world.up("gpt2")), "task": str(world.task)}
    recycle(weights=str(weights), method="apply", out=str(world.root / "b-apply"), **told)
    again = {"old_base": str(world.up("gpt2")), "base": str(world.up("gpt2")), "task": str(world.task)}
    recycle(weights=str(world.root / "b-apply"), method="init", out=str(world.root / "b-init"), **again, **STEPS)
    new = load_file(world.up("gpt2") / "model.safetensors")
    for name, folder in (("b-apply", world.root / "b-apply"), ("b-init", world.root / "b-init")):
        moved = {n for n, tensor in AdaptedWeights(folder).delta.items() if tensor.any()}
        assert moved == biases.keys(), name
        size = (folder / "delta.safetensors").stat().st_size
        assert size < 0.5 * (world.up("gpt2") / "model.safetensors").stat().st_size, (
            "what was not trained takes no room"
        )
        world.store.add(name, folder, str(world.up("gpt2")), codec="bf16")
        world.store.export(name, str(world.up("gpt2")), world.root / f"{name}-merged", merged=True)
        tensors = load_file(world.root / f"{name}-merged" / "model.safetensors")
        same = {n for n in new if n in tensors and torch.equal(tensors[n], new[n])}
        assert {n for n in new if n.startswith("transformer.") and not n.endswith(".bias")} <= same
    with pytest.raises(InputError, match="expected --merged"):
        world.store.export("b-init", str(world.up("gpt2")), world.root / "no", merged=False)
