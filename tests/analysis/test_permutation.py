"""Alignment by permutation: a base whose neurons and heads have changed places is put in order again, exactly."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from families import config, drawn
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, BertForSequenceClassification
from worlds import make_adapter, make_base, make_outdated, make_task

from recyclable.analysis.permutation import match
from recyclable.cli import main
from recyclable.errors import InputError
from recyclable.weights.base import Base
from recyclable.weights.manifest import DELTA, HEAD

HIDDEN, NEURONS, HEADS, LAYERS = 32, 64, 2, 2


class World:
    """A base, tuned weights of it, and a copy of it in which neurons and heads have changed places."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.base = make_base(root / "base")
        self.task = make_task(root / "task")
        self.weights = make_outdated(self.base, self.task, root / "weights", scale=0.1)
        draw = np.random.default_rng(3)
        self.neurons = [draw.permutation(NEURONS) for _ in range(LAYERS)]
        self.heads = [np.array([1, 0]), np.array([0, 1])]
        self.moved = self.copy(root / "moved", noise=0.0)

    def copy(self, folder: Path, noise: float) -> Path:
        shutil.copytree(self.base, folder)
        tensors = load_file(folder / "model.safetensors")
        draw = torch.Generator().manual_seed(1)
        for layer, (neurons, heads) in enumerate(zip(self.neurons, self.heads, strict=True)):
            rows = torch.arange(HIDDEN).view(HEADS, -1)[torch.tensor(heads)].reshape(-1)
            inside = f"bert.encoder.layer.{layer}."
            for part in ("weight", "bias"):
                for name in ("query", "key", "value"):
                    tensors[f"{inside}attention.self.{name}.{part}"] = tensors[f"{inside}attention.self.{name}.{part}"][
                        rows
                    ]
                first = f"{inside}intermediate.dense.{part}"
                tensors[first] = tensors[first][torch.tensor(neurons)]
            for name, order in (("attention.output", rows), ("output", torch.tensor(neurons))):
                second = f"{inside}{name}.dense.weight"
                tensors[second] = tensors[second][:, order]
        tensors = {n: t.contiguous() + noise * torch.randn(t.shape, generator=draw) for n, t in sorted(tensors.items())}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("permutation"))


def logits(model: BertForSequenceClassification, folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**AutoTokenizer.from_pretrained(folder)("w1 w2 w70 w3", return_tensors="pt")).logits


@pytest.mark.parametrize("noise", [0.0, 0.03])
def test_a_permuted_copy_is_recovered_exactly_also_with_noise(world: World, tmp_path: Path, noise: float) -> None:
    moved = world.copy(tmp_path / "moved", noise)
    found = match(Base(world.base), Base(moved))
    assert len(found) == 2 * LAYERS
    for layer in range(LAYERS):
        (heads, head_order), (neurons, neuron_order) = found[2 * layer : 2 * layer + 2]
        assert (heads.count, neurons.count) == (HEADS, NEURONS)
        assert head_order.tolist() == world.heads[layer].tolist()
        assert neuron_order.tolist() == world.neurons[layer].tolist()
        assert len(heads.rows) == 6 and len(neurons.rows) == 2
        assert neurons.columns == (f"encoder.layer.{layer}.output.dense.weight",)


def test_applied_weights_compute_on_a_permuted_base_what_they_do_on_their_own(world: World, tmp_path: Path) -> None:
    command = ["apply", "--weights", str(world.weights), "--base", str(world.moved), "--allow-unrelated", "--out"]
    assert main([*command, str(tmp_path / "aligned"), "--align", "permutation"]) == 0
    assert main([*command, str(tmp_path / "plain")]) == 0
    record = json.loads((tmp_path / "aligned" / "recycled.json").read_text())
    assert record["settings"]["align"] == "permutation" and record["weights"][0]["relation"] == "unrelated"
    delta, head, base = load_file(world.weights / DELTA), load_file(world.weights / HEAD), Base(world.base)
    model = BertForSequenceClassification.from_pretrained(world.base, num_labels=3)
    values = {n: base[n] + delta[n] for n in delta} | head
    model.load_state_dict({n: values[n.removeprefix("bert.")] for n in model.state_dict()})
    wanted = logits(model, world.base)
    aligned, plain = (
        logits(BertForSequenceClassification.from_pretrained(tmp_path / name), world.base)
        for name in ("aligned", "plain")
    )
    assert torch.allclose(aligned, wanted, atol=1e-5)
    assert not torch.allclose(plain, wanted, atol=1e-2)


def refused(capsys: pytest.CaptureFixture, out: Path, *options: object) -> str:
    assert main(["apply", "--out", str(out), "--align", "permutation", *map(str, options)]) == 2
    assert not out.exists()
    return capsys.readouterr().err


def test_what_cannot_be_aligned_is_refused(world: World, tmp_path: Path, capsys) -> None:
    out, given = tmp_path / "out", ("--weights", world.weights, "--base", world.moved)
    assert "align: is permutation, for bases that are not related" in refused(capsys, out, *given)
    wide = make_base(tmp_path / "wide", hidden=48)
    said = refused(capsys, out, "--weights", world.weights, "--base", wide, "--allow-unrelated")
    assert "cannot be aligned" in said
    lora = make_adapter(world.base, world.task, tmp_path / "lora", "lora")
    said = refused(capsys, out, "--weights", lora, "--base", world.moved, "--allow-unrelated")
    assert "is an adapter: ties, dare, skip_embeddings and align are for deltas" in said


@pytest.mark.parametrize("family", ["gpt2", "deberta-v2"])
def test_a_family_that_is_not_known_is_refused(family: str, tmp_path: Path) -> None:
    drawn(config(family)).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=f"{tmp_path}: is a {family}: its heads and neurons are not known here"):
        match(Base(tmp_path), Base(tmp_path))
