"""Large random models on disk: a base, its upgrade, a checkpoint tuned on the base, and its exact delta."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import BertWordPieceTokenizer
from transformers import BertConfig, BertTokenizerFast, PreTrainedModel

from recyclable.carrying.places import canonical_names
from recyclable.models.build import auto_class, structure
from recyclable.weights.adapted import write_manifest
from recyclable.weights.base import Base
from recyclable.weights.checkpoint_files import SafetensorsFile
from recyclable.weights.delta import Codec, write_delta
from recyclable.weights.durable import write_json
from recyclable.weights.files import write_safetensors
from recyclable.weights.fingerprint import fingerprint
from recyclable.weights.lineage import FILE, ancestors_for_child
from recyclable.weights.manifest import DELTA, HEAD, Manifest

LABELS = ["no", "yes"]
_LAYER_BYTES = 50.4e6


def layers_for(gigabytes: float) -> int:
    """How many layers make a model of this size (10^9 bytes)."""
    return round(gigabytes * 1e9 / _LAYER_BYTES)


def make_world(folder: Path, layers: int, vocabulary: int, tokenizer: bool = False) -> Path:
    """old/, new/ (its upgrade), tuned/ (an HF checkpoint on old) and weights/ (its exact delta): BERTs of fp32.

    A layer has 50.4 MB, a row of the vocabulary 4 kB.

    Args:
        tokenizer: the bases have one, of as many words as fit.
    """
    config = BertConfig(
        vocab_size=vocabulary,
        hidden_size=1024,
        num_hidden_layers=layers,
        num_attention_heads=16,
        intermediate_size=4096,
        num_labels=len(LABELS),
        id2label=dict(enumerate(LABELS)),
    )
    shapes = {name: tuple(p.shape) for name, p in _structure(config).named_parameters()}
    for seed, name in enumerate(("old", "new", "tuned")):
        (folder / name).mkdir(parents=True)
        scale, own = (1.0, 0) if name == "old" else (1e-3, seed)
        _write_model(folder / name / "model.safetensors", shapes, scale, own, folder / "old" / "model.safetensors")
        config.save_pretrained(folder / name)
        if tokenizer:
            words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(vocabulary - 5))]
            made = BertWordPieceTokenizer({word: i for i, word in enumerate(words)})._tokenizer
            BertTokenizerFast(tokenizer_object=made).save_pretrained(folder / name)
    old, new = Base(folder / "old"), Base(folder / "new")
    prints = {base.folder.name: fingerprint(base).as_dict() for base in (old, new)}
    ancestors = ancestors_for_child(old.folder, str(old.folder), prints["old"])
    write_json(new.folder / FILE, {"format": 1, "fingerprint": prints["new"], "ancestors": ancestors})
    _write_weights(folder / "weights", Base(folder / "tuned"), old, prints["old"], "none")
    return folder


def make_task(folder: Path) -> Path:
    """A few texts of the world's words and labels."""
    folder.mkdir()
    rows = [{"text": f"w{i} w{2 * i} w{3 * i}", "label": LABELS[i % 2]} for i in range(16)]
    for split in ("train", "dev", "test"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def tune_another(world: Path) -> None:
    """other-old/ and other-new/: another task's weights on both bases."""
    tuned = Base(world / "tuned")
    for name in ("old", "new"):
        base = Base(world / name)
        _write_weights(world / f"other-{name}", tuned, base, fingerprint(base).as_dict(), "other")


def _structure(config: BertConfig) -> PreTrainedModel:
    return structure(config, auto_class("SequenceClassification"))


def _write_weights(folder: Path, tuned: Base, base: Base, print_: dict[str, str], task: str) -> None:
    """An exact delta of `tuned` from `base`, and its head."""
    folder.mkdir()
    write_delta(folder / DELTA, tuned, base, Codec())
    file, names = SafetensorsFile(tuned.folder / "model.safetensors"), canonical_names(_structure(tuned.config))
    head = {n: file[names[n]] for n in names if n not in base}
    write_safetensors(folder / HEAD, {n: (t.dtype, tuple(t.shape)) for n, t in head.items()}, head.items())
    manifest = Manifest(
        kind="delta",
        tuning={"tuning": "full"},
        task={"name": task, "problem": "classification", "labels": LABELS, "digest": ""},
        base={"name": str(base.folder), "fingerprint": print_},
        method="tune",
        metrics={},
        history=[],
        settings={"seed": 20, "max_length": 128},
    )
    write_manifest(folder, manifest)


def _write_model(path: Path, shapes: dict[str, tuple[int, ...]], scale: float, seed: int, old: Path) -> None:
    draw = torch.Generator().manual_seed(seed)
    before = SafetensorsFile(old) if old.exists() else None

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for name, shape in shapes.items():
            noise = torch.empty(shape).normal_(0, 0.02 * scale, generator=draw)
            yield name, noise if before is None else before[name] + noise

    write_safetensors(path, {name: (torch.float32, shape) for name, shape in shapes.items()}, tensors())
