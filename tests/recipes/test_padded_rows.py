"""Embeddings padded to a multiple: rows follow their tokens, whichever of base, upgrade and tuned model was padded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from encoders import encoder, encoder_config
from safetensors.torch import load_file
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
)
from verbs import Verbs
from worlds import LABELS, make_base, make_corpus, make_model, make_task

from recyclable.weights.store import VARIABLE

TOKENS, PADDED = 200, 256
WORDS = "bert.embeddings.word_embeddings.weight"
TEXTS = ["w1 w20 w33", "w194 w0 w7 w100 w61", "w5"]


class World:
    """A base of as many rows as tokens, each model also padded, and a task."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.base = make_base(folder / "base")
        self.task = make_task(folder / "task", train=24, dev=12, test=12)
        self.corpus = make_corpus(folder / "corpus", documents=40)

    def padded(self, folder: Path, auto: Any = AutoModelForMaskedLM, name: str | None = None) -> Path:
        """As transformers pads it: some more rows, drawn at random."""
        out = self.folder / (name or f"{folder.name}-padded")
        if not out.exists():
            model = auto.from_pretrained(folder)
            torch.manual_seed(9)
            model.resize_token_embeddings(pad_to_multiple_of=128)
            assert model.config.vocab_size == PADDED
            model.save_pretrained(out)
            AutoTokenizer.from_pretrained(folder).save_pretrained(out)
        return out

    def moved(self, folder: Path, name: str, seed: int) -> Path:
        """Another set of weights in the same shapes."""
        out = self.folder / name
        if not out.exists():
            moved(AutoModelForMaskedLM.from_pretrained(folder), seed).save_pretrained(out)
            AutoTokenizer.from_pretrained(folder).save_pretrained(out)
        return out

    def tuned(self, folder: Path, name: str) -> Path:
        out = self.folder / name
        if not out.exists():
            torch.manual_seed(3)
            labels = {"id2label": dict(enumerate(LABELS)), "label2id": {label: i for i, label in enumerate(LABELS)}}
            moved(AutoModelForSequenceClassification.from_pretrained(folder, **labels), 3).save_pretrained(out)
            AutoTokenizer.from_pretrained(folder).save_pretrained(out)
        return out


def moved(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model.eval()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("padded"))


@pytest.fixture
def verbs(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Verbs:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "store"))
    return Verbs(tmp_path, capsys)


def done(verbs: Verbs, *argv: object) -> None:
    assert verbs.run(*argv) == (0, []), argv


def logits(folder: Path) -> torch.Tensor:
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        return model(**AutoTokenizer.from_pretrained(folder)(TEXTS, padding=True, return_tensors="pt")).logits


def carried_by_hand(tuned: Path, old: Path, new: Path) -> dict[str, torch.Tensor]:
    """new + tuned - old where all three have a tensor, of embeddings the tokens' rows; else the tuned tensor."""
    of_tuned, of_old, result = (load_file(folder / "model.safetensors") for folder in (tuned, old, new))
    wanted = {}
    for name, tensor in of_tuned.items():
        if name not in result:
            wanted[name] = tensor
        elif name == WORDS:
            wanted[name] = result[name]
            wanted[name][:TOKENS] += tensor[:TOKENS] - of_old[name][:TOKENS]
        else:
            wanted[name] = result[name] + tensor - of_old[name]
    return wanted


@pytest.mark.parametrize("padded", ["upgrade", "base"])
def test_tuned_weights_go_onto_an_upgrade_with_other_rows(world: World, verbs: Verbs, padded: str) -> None:
    old, new = world.base, world.moved(world.base, "up", 2)
    old, new = (old, world.padded(new)) if padded == "upgrade" else (world.padded(old), new)
    tuned = world.tuned(old, f"tuned-{old.name}")
    if not (new / "lineage.json").exists():
        done(verbs, "lineage", "declare", new, "--parent", old)
    done(verbs, "store", "add", "--tuned", tuned, "--base", old, "--name", "n")
    done(verbs, "store", "export", "n", "--merged", "--base", new, "--out", verbs.out)
    found, wanted = load_file(verbs.out / "model.safetensors"), carried_by_hand(tuned, old, new)
    assert found.keys() == wanted.keys()
    assert all(torch.allclose(found[name], wanted[name], atol=1e-6) for name in wanted)
    assert len(found[WORDS]) == len(load_file(new / "model.safetensors")[WORDS])
    assert torch.equal(found[WORDS][TOKENS:], load_file(new / "model.safetensors")[WORDS][TOKENS:])
    done(verbs, "evaluate", "--weights", "n", "--base", new, "--task", world.task)
    probe = (
        "probe",
        "--weights",
        "n",
        "--base",
        new,
        "--old-base",
        old,
        "--task",
        world.task,
        "--out",
        verbs.tmp / "p",
    )
    done(verbs, *probe)
    distance = json.loads((verbs.tmp / "p" / "probe.json").read_text())["evidence"]["distance"]
    before, after = ({n: t[:TOKENS] for n, t in load_file(f / "model.safetensors").items()} for f in (old, new))
    moves = [(after[name] - before[name]).double().square().sum() for name in before if name.startswith("bert.")]
    assert distance["left_out"] == []
    assert distance["whole"]["l2"] == pytest.approx(float(sum(moves)) ** 0.5, rel=1e-6), "padding does not count"


@pytest.mark.parametrize("padded", ["tuned", "base"])
def test_a_tuned_model_with_other_rows_than_its_base_keeps_the_base_s(world: World, verbs: Verbs, padded: str) -> None:
    tuned, base = world.tuned(world.base, "tuned-base"), world.base
    if padded == "tuned":
        tuned = world.padded(tuned, AutoModelForSequenceClassification)
    else:
        base = world.padded(base)
    done(verbs, "store", "add", "--tuned", tuned, "--base", base, "--name", "n")
    done(verbs, "store", "export", "n", "--merged", "--base", base, "--out", verbs.out)
    found, own = load_file(verbs.out / "model.safetensors"), load_file(tuned / "model.safetensors")
    assert torch.equal(found[WORDS][:TOKENS], own[WORDS][:TOKENS])
    assert torch.equal(found[WORDS][TOKENS:], load_file(base / "model.safetensors")[WORDS][TOKENS:])
    assert all(torch.equal(found[name], own[name]) for name in own if name != WORDS)
    assert torch.equal(logits(verbs.out), logits(tuned))


def test_rows_of_which_no_tokenizer_tells_are_refused(world: World, verbs: Verbs) -> None:
    tuned = world.padded(world.tuned(world.base, "tuned-base"), AutoModelForSequenceClassification, "without")
    for file in tuned.glob("tokenizer*"):
        file.unlink()
    add = ("store", "add", "--tuned", tuned, "--base", world.base, "--name", "n")
    assert f"{WORDS} has 256 rows, the base's 200, with no tokenizer that says which" in verbs.refused(*add)
    done(verbs, *add, "--tokenizer", world.base)


def test_tokens_beyond_the_base_s_rows_are_refused(world: World, verbs: Verbs) -> None:
    tuned = world.padded(world.tuned(world.base, "tuned-base"), AutoModelForSequenceClassification, "with-tokens")
    tokenizer = AutoTokenizer.from_pretrained(tuned)
    tokenizer.add_tokens(["brand", "new"])
    tokenizer.save_pretrained(tuned)
    add = ("store", "add", "--tuned", tuned, "--base", world.base, "--name", "n")
    assert f"{WORDS} has 256 rows, the base's 200, for 202 tokens" in verbs.refused(*add)


@pytest.mark.parametrize("method", ["init", "apply", "distill"])
def test_recycling_onto_a_padded_upgrade(world: World, verbs: Verbs, method: str) -> None:
    new = world.padded(world.moved(world.base, "up", 2))
    if not (new / "lineage.json").exists():
        done(verbs, "lineage", "declare", new, "--parent", world.base)
    done(verbs, "store", "add", "--tuned", world.tuned(world.base, "tuned-base"), "--base", world.base, "--name", "n")
    settings = {"method": method, "base": new, "old_base": world.base, "weights": "n", "task": world.task}
    done(verbs, *verbs.training("recycle", **settings))
    assert load_file(verbs.out / "delta.safetensors")["embeddings.word_embeddings.weight"].shape == (PADDED, 32)


@pytest.mark.parametrize("teacher", ["none", "padded", "itself"])
def test_a_padded_base_is_trained_on(world: World, verbs: Verbs, teacher: str) -> None:
    """Of the two that are no teacher of itself the student has as many rows as tokens."""
    base = world.base if teacher == "padded" else world.padded(world.base)
    settings = {} if teacher == "none" else {"teacher": world.padded(world.base)}
    done(verbs, *verbs.training("pretrain", base=base, corpus=world.corpus, **settings))
    rows = len(load_file(base / "model.safetensors")[WORDS])
    assert len(load_file(verbs.out / "model.safetensors")[WORDS]) == rows
    assert json.loads((verbs.out / "config.json").read_text())["vocab_size"] == rows


def test_an_output_layer_of_its_own_weights_is_padded_as_well(world: World, verbs: Verbs) -> None:
    config = encoder_config("eurobert", vocab_size=TOKENS, tie_word_embeddings=False, max_position_embeddings=64)
    base = make_model(verbs.tmp / "own", encoder(config, 1))
    up = world.padded(make_model(verbs.tmp / "own-up", encoder(config, 2)))
    rows = {name: t.shape[0] for name, t in load_file(up / "model.safetensors").items() if t.shape[0] == PADDED}
    assert rows.keys() == {"lm_head.weight", "model.embed_tokens.weight"}
    done(verbs, "lineage", "declare", up, "--parent", base)
    tuned = verbs.tmp / "tuned"
    done(verbs, *verbs.training("tune", base=base, task=world.task, out=tuned))
    done(verbs, "apply", "--weights", tuned, "--base", up, "--out", verbs.tmp / "applied")
    found, wanted = (
        load_file(f / "model.safetensors")["model.embed_tokens.weight"] for f in (verbs.tmp / "applied", up)
    )
    wanted[:TOKENS] += load_file(tuned / "delta.safetensors")["embed_tokens.weight"]
    assert torch.allclose(found, wanted, atol=1e-6)
    done(verbs, *verbs.training("pretrain", base=up, corpus=world.corpus, teacher=base))
    assert len(load_file(verbs.out / "model.safetensors")["lm_head.weight"]) == PADDED
