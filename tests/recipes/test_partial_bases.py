"""A base may have more than its task's model: an output layer of its own weights, a decoder; it stays behind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from encoders import encoder, encoder_config, moved, save
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification, T5EncoderModel
from verbs import Verbs
from worlds import make_tagged_task, make_task

from recyclable.weights.manifest import DELTA, HEAD
from recyclable.weights.store import VARIABLE

CLASSIFIER, TAGGER = AutoModelForSequenceClassification, AutoModelForTokenClassification
WEIGHTS = "model.safetensors"


@pytest.fixture
def verbs(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Verbs:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "store"))
    return Verbs(tmp_path, capsys)


def done(verbs: Verbs, *argv: object) -> None:
    status, said = verbs.run(*argv)
    assert status == 0, said


def require_applied(auto: type, folder: Path, base: Path, weights: Path) -> None:
    """What plain transformers opens there is base + delta and the head, and nothing else."""
    model, about = auto.from_pretrained(folder, output_loading_info=True)
    assert not about["missing_keys"] and not about["unexpected_keys"] and not about["mismatched_keys"]
    prefix = f"{model.base_model_prefix}."
    of_base = {name.removeprefix(prefix): tensor for name, tensor in load_file(base / WEIGHTS).items()}
    delta, head = load_file(weights / DELTA), load_file(weights / HEAD)
    for name, tensor in load_file(folder / WEIGHTS).items():  # as transformers opens Funnel, its row of padding is 0
        inside = name.removeprefix(prefix)
        wanted = head[inside] if inside in head else of_base[inside] + delta[inside].view_as(tensor)
        assert torch.allclose(tensor, wanted, atol=1e-6), name


@pytest.mark.parametrize(
    ("family", "auto", "left"),
    [
        ("eurobert", CLASSIFIER, "lm_head.weight"),
        ("bert", TAGGER, "cls.predictions.decoder.weight"),
        ("t5", CLASSIFIER, "lm_head.weight"),
        ("t5", TAGGER, "decoder.final_layer_norm.weight"),
        ("t5 encoder", TAGGER, "nothing"),
        ("funnel", CLASSIFIER, "funnel.decoder.layers.0.ffn.linear_1.weight"),
    ],
)
def test_what_a_task_s_model_has_no_place_for_stays_behind(verbs: Verbs, family: str, auto: type, left: str) -> None:
    config = encoder_config(family.partition(" ")[0], tie_word_embeddings=False)
    model = moved(T5EncoderModel(config), 1) if family == "t5 encoder" else encoder(config, 1)
    base, up = save(model, verbs.tmp / "base"), save(moved(model, 2), verbs.tmp / "up")
    if family == "t5":  # which transformers ties as it saves; published ones of version 1.1 have a head in their files
        for seed, folder in enumerate((base, up)):
            tensors, draw = load_file(folder / WEIGHTS), torch.Generator().manual_seed(seed)
            head = {"lm_head.weight": torch.randn(tensors["shared.weight"].shape, generator=draw)}
            save_file(tensors | head, folder / WEIGHTS, metadata={"format": "pt"})
    assert left == "nothing" or left in load_file(base / WEIGHTS)
    task = (make_tagged_task if auto is TAGGER else make_task)(verbs.tmp / "task", train=12, dev=6, test=6)
    done(verbs, "lineage", "declare", up, "--parent", base)
    tuned, recycled = verbs.tmp / "tuned", verbs.tmp / "recycled"
    done(verbs, *verbs.training("tune", base=base, task=task, out=tuned))
    for on in (base, up):
        done(verbs, "evaluate", "--weights", tuned, "--base", on, "--task", task)
        done(verbs, "apply", "--weights", tuned, "--base", on, "--out", verbs.tmp / f"on-{on.name}")
        require_applied(auto, verbs.tmp / f"on-{on.name}", on, tuned)
    settings = {"base": up, "old_base": base, "weights": tuned, "task": task}
    done(verbs, *verbs.training("recycle", method="init", **settings))
    done(verbs, *verbs.training("recycle", method="apply", **settings, out=recycled))
    done(verbs, "apply", "--weights", recycled, "--base", up, "--out", verbs.tmp / "again")
    require_applied(auto, verbs.tmp / "again", up, tuned)
    done(verbs, "store", "add", "--tuned", tuned, "--name", "n")
    done(verbs, "store", "export", "n", "--merged", "--base", up, "--out", verbs.tmp / "exported")
    require_applied(auto, verbs.tmp / "exported", up, tuned)
