"""Large random models on disk: a base, its upgrade, a checkpoint tuned on the base, and its exact delta."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import BertConfig

from recyclable.models import canonical_names, structure
from recyclable.weights.adapted import DELTA, HEAD, Manifest, write_manifest
from recyclable.weights.base import Base
from recyclable.weights.checkpoint_files import SafetensorsFile
from recyclable.weights.delta import Codec, write_delta
from recyclable.weights.files import write_json, write_safetensors
from recyclable.weights.fingerprint import fingerprint
from recyclable.weights.lineage import FILE, ancestors_for_child

LABELS = ["no", "yes"]
_LAYER_BYTES = 50.4e6


def layers_for(gigabytes: float) -> int:
    """How many layers make a model of this size (10^9 bytes)."""
    return round(gigabytes * 1e9 / _LAYER_BYTES)


def make_world(folder: Path, layers: int, vocabulary: int) -> Path:
    """old/, new/ (its upgrade), tuned/ (an HF checkpoint on old) and weights/ (its exact delta): BERTs of fp32.

    A layer has 50.4 MB, a row of the vocabulary 4 kB.
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
    model = structure(config)
    names, shapes = canonical_names(model), {n: tuple(p.shape) for n, p in model.named_parameters()}
    for seed, name in enumerate(("old", "new", "tuned")):
        (folder / name).mkdir(parents=True)
        scale, own = (1.0, 0) if name == "old" else (1e-3, seed)
        _write_model(folder / name / "model.safetensors", shapes, scale, own, folder / "old" / "model.safetensors")
        config.save_pretrained(folder / name)
    old, new = Base(folder / "old"), Base(folder / "new")
    prints = {base.folder.name: fingerprint(base).as_dict() for base in (old, new)}
    ancestors = ancestors_for_child(old.folder, str(old.folder), prints["old"])
    write_json(new.folder / FILE, {"format": 1, "fingerprint": prints["new"], "ancestors": ancestors})
    weights = folder / "weights"
    weights.mkdir()
    write_delta(weights / DELTA, Base(folder / "tuned"), old, Codec())
    tuned = SafetensorsFile(folder / "tuned" / "model.safetensors")
    head = {n: tuned[names[n]] for n in names if n not in old}
    write_safetensors(weights / HEAD, {n: (t.dtype, tuple(t.shape)) for n, t in head.items()}, head.items())
    manifest = Manifest(
        kind="delta",
        tuning={"tuning": "full"},
        task={"name": "none", "problem": "classification", "labels": LABELS, "digest": ""},
        base={"name": str(old.folder), "fingerprint": prints["old"]},
        method="tune",
        metrics={},
        history=[],
        settings={"seed": 20, "max_length": 128},
    )
    write_manifest(weights, manifest)
    return folder


def _write_model(path: Path, shapes: dict[str, tuple[int, ...]], scale: float, seed: int, old: Path) -> None:
    draw = torch.Generator().manual_seed(seed)
    before = SafetensorsFile(old) if old.exists() else None

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for name, shape in shapes.items():
            noise = torch.empty(shape).normal_(0, 0.02 * scale, generator=draw)
            yield name, noise if before is None else before[name] + noise

    write_safetensors(path, {name: (torch.float32, shape) for name, shape in shapes.items()}, tensors())
