"""Distances of weights, streamed, against numpy on whole tensors in float64."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import BertConfig

from recyclable.analysis.distance import Products, distance, products, total
from recyclable.analysis.lora_difference import LoraDifference
from recyclable.architectures.structure import Structure
from recyclable.weights import digest
from recyclable.weights.checkpoint_files import InMemory
from recyclable.weights.team import Team

SHAPES = {
    "embeddings.word_embeddings.weight": (300, 7),
    "encoder.layer.0.query.weight": (70_001, 3),  # more than a chunk
    "encoder.layer.0.query.bias": (5,),
    "encoder.layer.1.query.weight": (9, 9),
    "norm.weight": (4,),
}
GROUPS = Structure(BertConfig(num_hidden_layers=2)).layers


def drawn(seed: int, scale: float = 1.0, shapes: Mapping[str, tuple[int, ...]] = SHAPES) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {name: scale * torch.randn(shape, generator=draw) for name, shape in shapes.items()}


FIRST = drawn(1)
SECOND = {name: tensor + step for (name, tensor), step in zip(FIRST.items(), drawn(2, 1e-2).values(), strict=True)}
TUNING = drawn(3, 1e-3)


def flat(tensors: Mapping[str, torch.Tensor], names: list[str]) -> np.ndarray:
    return np.concatenate([tensors[name].numpy().astype(np.float64).ravel() for name in names])


@pytest.mark.parametrize("pieces", [None, 100])
def test_every_measure_is_numpys(monkeypatch: pytest.MonkeyPatch, pieces: int | None) -> None:
    if pieces:
        monkeypatch.setattr(digest, "_ELEMENTS", pieces)
    found = distance(InMemory(FIRST), InMemory(SECOND), GROUPS, InMemory(TUNING))
    groups = {
        "embeddings": ["embeddings.word_embeddings.weight"],
        "layer 0": ["encoder.layer.0.query.weight", "encoder.layer.0.query.bias"],
        "layer 1": ["encoder.layer.1.query.weight"],
        "other": ["norm.weight"],
    }
    assert [layer["layer"] for layer in found["layers"]] == list(groups)
    entries = {layer["layer"]: layer for layer in found["layers"]}
    for group, entry in {**entries, "whole": found["whole"]}.items():
        a, b, d = (flat(tensors, groups.get(group, list(SHAPES))) for tensors in (FIRST, SECOND, TUNING))
        step = b - a
        wanted = {
            "elements": a.size,
            "l2": np.linalg.norm(step),
            "rms": np.sqrt((step**2).mean()),
            "relative": np.linalg.norm(step) / np.linalg.norm(a),
            "cosine": a @ b / np.linalg.norm(a) / np.linalg.norm(b),
            "tuning_l2": np.linalg.norm(d),
            "tuning_rms": np.sqrt((d**2).mean()),
            "tuning_cosine": step @ d / np.linalg.norm(step) / np.linalg.norm(d),
            "ratio": np.linalg.norm(step) / np.linalg.norm(d),
        }
        got = {name: value for name, value in entry.items() if name != "layer"}
        assert got.keys() == wanted.keys()
        for name, value in wanted.items():
            # the step is rounded to fp32, as deltas on disk are
            assert got[name] == pytest.approx(value, rel=1e-6, abs=1e-8), (group, name)


def test_sums_lose_nothing_that_float32_would_lose() -> None:
    """A million ones after a large number: in fp32 each of them would be rounded away."""
    values = torch.ones(1 << 20)
    values[0] = 2.0**14
    found = products(lambda name, start, stop: [values[start:stop]], {"a": (1 << 20,)})["a"]
    assert found.gram[0, 0] == 2.0**28 + (1 << 20) - 1


def test_nothing_is_read_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digest, "_ELEMENTS", 1000)
    seen: dict[str, list[tuple[int, int]]] = {}

    def read(name: str, start: int, stop: int) -> list[torch.Tensor]:
        seen.setdefault(name, []).append((start, stop))
        return [FIRST[name].view(-1)[start:stop]]

    products(read, SHAPES)
    for name, ranges in seen.items():
        ordered = sorted(ranges)
        assert [ordered[0][0], ordered[-1][1]] == [0, FIRST[name].numel()]
        assert all(a[1] == b[0] for a, b in itertools.pairwise(ordered))


def test_what_does_not_exist_is_absent() -> None:
    same = distance(InMemory(FIRST), InMemory(FIRST), GROUPS, InMemory({n: 0 * t for n, t in FIRST.items()}))
    assert same["whole"]["l2"] == 0 and same["whole"]["cosine"] == pytest.approx(1)
    assert "ratio" not in same["whole"] and "tuning_cosine" not in same["whole"]
    assert "tuning_l2" not in distance(InMemory(FIRST), InMemory(SECOND), GROUPS)["whole"]


def test_tensors_that_cannot_be_compared_are_named_and_left_out() -> None:
    other = {**SECOND, "embeddings.word_embeddings.weight": torch.randn(301, 7), "extra": torch.randn(2)}
    found = distance(InMemory(FIRST), InMemory(other), GROUPS)
    assert found["left_out"] == ["embeddings.word_embeddings.weight", "extra"]
    assert found["whole"]["elements"] == sum(t.numel() for n, t in FIRST.items() if "word" not in n)


def test_a_tuning_of_some_tensors_has_not_moved_the_others() -> None:
    some = {"encoder.layer.1.query.weight": TUNING["encoder.layer.1.query.weight"]}
    found = distance(InMemory(FIRST), InMemory(SECOND), GROUPS, InMemory(some))
    whole = {**{n: torch.zeros_like(t) for n, t in FIRST.items()}, **some}
    assert found["whole"] == distance(InMemory(FIRST), InMemory(SECOND), GROUPS, InMemory(whole))["whole"]


class Half(Team):
    """One of two members that are asked one after the other; the first one's results are what the second gathers."""

    size = 2

    def __init__(self, rank: int, others: list) -> None:
        self.rank, self.others = rank, others

    def gather(self, value):
        self.others.append(value)
        return self.others if self.rank else [value, value]


def test_a_team_finds_what_one_finds_to_the_last_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digest, "_ELEMENTS", 100)
    shapes = {name: shape for name, shape in SHAPES.items() if "layer.0.query.weight" not in name}
    tasks = digest.element_pieces(shapes)
    assert len(tasks) % 2 == 0  # so that the first half's stand-in for the second has the right length

    def read(name: str, start: int, stop: int) -> list[torch.Tensor]:
        return [tensors[name].view(-1)[start:stop] for tensors in (FIRST, TUNING)]

    shared: list = []
    products(read, shapes, Half(0, shared))
    together, alone = products(read, shapes, Half(1, shared)), products(read, shapes)
    assert all((together[name].gram == alone[name].gram).all() for name in alone)


def test_combinations_of_vectors() -> None:
    draw = np.random.default_rng(1)
    vectors = draw.normal(size=(3, 50))
    of = Products(50, vectors @ vectors.T).combined([[1, 1, 0], [0, -2, 0.5]])
    made = np.array([[1, 1, 0], [0, -2, 0.5]]) @ vectors
    assert np.allclose(of.gram, made @ made.T)
    assert total([of, of]).l2(0) == pytest.approx(np.sqrt(2) * np.linalg.norm(made[0]))


@pytest.mark.parametrize(("rslora", "transposed"), [(False, False), (True, False), (False, True)])
def test_a_loras_difference_is_what_peft_merges(rslora: bool, transposed: bool) -> None:
    from transformers.pytorch_utils import Conv1D

    layer = Conv1D(6, 10) if transposed else nn.Linear(10, 6)
    model = nn.ModuleDict({"q": layer})
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["q"], use_rslora=rslora, fan_in_fan_out=transposed)
    peft = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(len(name)))
    wanted = peft.base_model.model["q"].get_delta_weight("default").detach()
    file = {n.replace(".default", ""): p.detach() for n, p in peft.named_parameters() if "lora_" in n}
    content = {"r": 3, "lora_alpha": 5, "use_rslora": rslora, "fan_in_fan_out": transposed, "peft_type": "LORA"}
    adapter = InMemory(file)
    assert LoraDifference.is_plain(adapter, content)
    assert not LoraDifference.is_plain(adapter, {**content, "use_dora": True})
    names = {name: name.removeprefix("base_model.model.") for name in file}
    difference = LoraDifference(adapter, names, content)
    assert difference.names == ["q.weight"] and difference.shape("q.weight") == tuple(layer.weight.shape)
    assert torch.allclose(difference.read("q.weight"), wanted.flatten(), atol=1e-6)
    assert torch.allclose(difference.read("q.weight", 7, 23), wanted.flatten()[7:23], atol=1e-6)
