"""Bases whose vocabulary grows as they are trained further: on 2 ranks under ZeRO-3, resumed, and carried onto.

One launch trains a decoder with an untied head and an encoder without a trained head; the rest looks at what they left.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import taken_in
from piece_tokenizers import NEW, byte_level, word_pieces
from processes import STAGE_3, finish, outcome, start
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertModel, LlamaConfig, pipeline

from recyclable.carrying.changes import FoundChanges
from recyclable.cli import main
from recyclable.data.growing.growth import FILE
from recyclable.recipes.apply import apply

NUMBER, STEPS = 20, 4
SHARDED = {"zero_optimization": {"stage": 3, **STAGE_3}}
SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight")


def decoder(folder: Path) -> Path:
    byte_level(folder)
    torch.manual_seed(0)
    rows = len(AutoTokenizer.from_pretrained(folder))
    config = LlamaConfig(vocab_size=rows + 3, bos_token_id=0, eos_token_id=0, **SMALL)  # three rows of padding
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def encoder(folder: Path) -> Path:
    word_pieces(folder)
    torch.manual_seed(0)
    rows = len(AutoTokenizer.from_pretrained(folder))
    BertModel(BertConfig(vocab_size=rows, max_position_embeddings=32, **SMALL)).save_pretrained(folder)
    return folder


def settings(world: Path, base: str, out: str, **more: Any) -> dict[str, Any]:
    return {
        **{"base": str(world / base), "corpus": str(world / "new.txt"), "out": str(world / out), **more},
        **{"extend_vocabulary": NUMBER, "max_steps": STEPS, "train_batch_size": 4, "max_length": 16},
        **{"learning_rate": 1e-3, "save_every": 2, "eval_every": STEPS, "max_heldout_sequences": 8},
    }


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    world = tmp_path_factory.mktemp("extended")
    (world / "new.txt").write_text("\n".join(NEW))
    decoder(world / "decoder")
    encoder(world / "encoder")
    runs = []
    for out, how in (("whole", {}), ("broken", {"raise_at": 3}), ("broken", {"resume": True})):
        runs.append({"verb": "pretrain", "config": settings(world, "decoder", out), "ds_config": SHARDED, **how})
    headless = settings(world, "encoder", "headed", lm="masked", mlm_head_steps=2)
    runs.append({"verb": "pretrain", "config": headless, "ds_config": SHARDED})
    finish(start(world / "runs", runs, 2), world / "runs")
    return world


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_what_comes_out_opens_with_plain_transformers(world: Path) -> None:
    for base, out in (("decoder", "whole"), ("encoder", "headed")):
        assert outcome(world / out) == {}
        old, new = (AutoTokenizer.from_pretrained(world / each) for each in (base, out))
        assert len(new) == len(old) + NUMBER
        assert {piece: new.get_vocab()[piece] for piece in old.get_vocab()} == old.get_vocab()
        before, after = (sum(map(len, each(NEW)["input_ids"])) for each in (old, new))
        assert after < before
    said = pipeline("text-generation", str(world / "whole"), device="cpu")(NEW[0][:20], max_new_tokens=3)
    assert said[0]["generated_text"].startswith(NEW[0][:20])


def test_the_lineage_tells_what_was_learned(world: Path) -> None:
    for base, out in (("decoder", "whole"), ("encoder", "headed")):
        told = json.loads((world / out / "lineage.json").read_text())["extend_vocabulary"]
        old, new = (json.loads((world / each / "config.json").read_text())["vocab_size"] for each in (base, out))
        pieces = len(AutoTokenizer.from_pretrained(world / base))
        assert (told["asked"], told["learned"], told["first"]) == (NUMBER, NUMBER, pieces)
        assert told["rows"] == {"before": old, "after": new} and new == pieces + NUMBER
        assert told["characters"] == told["corpus_characters"] > 0
        assert told["tokens_per_text"]["after"] < told["tokens_per_text"]["before"]
        assert "new pieces of the vocabulary" in (world / out / "README.md").read_text()


def test_a_run_that_broke_off_goes_on_with_the_pieces_it_had_learned(world: Path) -> None:
    assert outcome(world / "broken") == {}
    for name in ("model.safetensors", "tokenizer.json", FILE):
        assert len({hashlib.sha256((world / out / name).read_bytes()).digest() for out in ("whole", "broken")}) == 1


def test_resuming_learns_nothing_anew(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def learned(*_: object) -> None:
        raise AssertionError("learned again")

    monkeypatch.setattr("recyclable.recipes.pretrain_vocabulary.learn", learned)
    file = world / "again.yaml"
    file.write_text(json.dumps(settings(world, "decoder", "whole")))
    assert main(["pretrain", str(file), "--resume"]) == 0


def test_weights_of_the_old_base_follow_their_tokens_and_new_rows_are_the_childs(world: Path, tmp_path: Path) -> None:
    tuned = tmp_path / "tuned"
    shutil.copytree(world / "decoder", tuned)
    model, noise = AutoModelForCausalLM.from_pretrained(tuned), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=noise)
    model.save_pretrained(tuned)
    weights = taken_in(tuned, world / "decoder", None, tmp_path / "weights")
    apply([weights], world / "whole", tmp_path / "out", FoundChanges())
    old, new, theirs, found = (tensors(each) for each in (world / "decoder", world / "whole", tuned, tmp_path / "out"))
    pieces = len(AutoTokenizer.from_pretrained(world / "decoder"))
    for name in new:
        rows = slice(pieces) if name in EMBEDDINGS else slice(None)
        assert torch.equal(found[name][rows], new[name][rows] + (theirs[name][rows] - old[name][rows])), name
        if name in EMBEDDINGS:
            assert torch.equal(found[name][pieces:], new[name][pieces:])


def test_what_cannot_be_is_refused_before_anything_is_written(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = world / "refused.yaml"
    given = settings(world, "decoder", "refused")
    for changed, wanted in (
        ({"teacher": str(world / "decoder")}, "knows none of the pieces of extend_vocabulary"),
        ({"extend_vocabulary": 10**6}, "expected fewer, or more text"),
        ({"extend_vocabulary": 0}, "extend_vocabulary"),
    ):
        file.write_text(json.dumps({**given, **changed}))
        assert main(["pretrain", str(file)]) == 2
        said = capsys.readouterr().err.strip()
        assert wanted in said and len(said.splitlines()) == 1
    assert not (world / "refused").exists()
