"""Deltas on disk: exact ones give the tuned weights back bit for bit, the others their approximation, by any range."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
import torch

from recyclable.errors import InputError
from recyclable.weights.checkpoint_files import SafetensorsFile
from recyclable.weights.delta import CODECS, Codec, Delta, write_delta
from recyclable.weights.digest import Digested
from recyclable.weights.files import SafetensorsWriter, write_tensors

BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
SHAPES = {"matrix": (70, 40), "bias": (40,), "large": (1100, 1000), "empty": (0, 3), "scalar": ()}


def opened(path: Path) -> Delta:
    return Delta(Digested(SafetensorsFile(path)))


def make(folder: Path, of_tuned: torch.dtype, of_base: torch.dtype, noise: float) -> tuple[SafetensorsFile, ...]:
    draw = torch.Generator().manual_seed(0)
    base = {name: torch.randn(shape, generator=draw).to(of_base) for name, shape in SHAPES.items()}
    tuned = {n: (t.float() + noise * torch.randn(t.shape, generator=draw)).to(of_tuned) for n, t in base.items()}
    if of_tuned == of_base:  # what cancels, changes sign, overflows, or is no number at all
        odd = [0.0, -0.0, 1e-7, -1.0, torch.finfo(of_tuned).max, torch.inf, torch.nan, torch.finfo(of_tuned).tiny]
        tuned["bias"][: len(odd)] = torch.tensor(odd).to(of_tuned)
        base["bias"][4] = -torch.finfo(of_base).max
    for name, tensors in (("tuned", tuned), ("base", base)):
        write_tensors(folder / f"{name}.safetensors", tensors)
    return SafetensorsFile(folder / "tuned.safetensors"), SafetensorsFile(folder / "base.safetensors")


@pytest.mark.parametrize("noise", [0.0, 0.01, 3.0])
@pytest.mark.parametrize("of_tuned", list(BITS))
@pytest.mark.parametrize("of_base", [torch.float32, torch.bfloat16, torch.float16])
def test_exact_gives_every_bit_back(tmp_path: Path, of_tuned: torch.dtype, of_base: torch.dtype, noise: float) -> None:
    tuned, base = make(tmp_path, of_tuned, of_base, noise)
    write_delta(tmp_path / "d.safetensors", tuned, base, Codec("exact"))
    delta = opened(tmp_path / "d.safetensors")
    assert delta.names == sorted(SHAPES)
    for name in SHAPES:
        back = delta.restore(name, base.read(name))
        assert back.dtype == of_tuned
        assert torch.equal(back.view(BITS[of_tuned]), tuned.read(name).view(BITS[of_tuned])), name
        numel = back.numel()
        for start, stop in ((numel // 3, numel // 2), (1, numel)):
            part = delta.restore(name, base.read(name, start, stop), start, stop) if start < stop else back[:0]
            assert torch.equal(part.view(BITS[of_tuned]), back[start:stop].view(BITS[of_tuned]))
    assert delta.shape("matrix") == (70, 40)


def test_what_tuning_moved_little_costs_no_more_than_the_tuned_weights(tmp_path: Path) -> None:
    tuned, base = make(tmp_path, torch.bfloat16, torch.bfloat16, 0.01)
    write_delta(tmp_path / "d.safetensors", tuned, base, Codec("exact"))
    size = (tmp_path / "d.safetensors").stat().st_size
    assert size < 1.15 * (tmp_path / "tuned.safetensors").stat().st_size
    assert opened(tmp_path / "d.safetensors").file.stored("large").dtype == torch.bfloat16


@pytest.mark.parametrize("codec", CODECS)
def test_ranges_are_parts_of_the_whole(tmp_path: Path, codec: str) -> None:
    tuned, base = make(tmp_path, torch.float32, torch.bfloat16, 0.1)
    write_delta(tmp_path / "d.safetensors", tuned, base, Codec(codec, rank=4))
    delta = opened(tmp_path / "d.safetensors")
    assert delta.codec == codec
    for name, shape in SHAPES.items():
        whole, numel = delta[name], int(np.prod(shape))
        assert whole.shape == torch.Size(shape) and whole.dtype == torch.float32
        for start, stop in ((0, numel), (numel // 3, numel // 2), (min(41, numel), min(79, numel))):
            torch.testing.assert_close(delta.read(name, start, stop), whole.view(-1)[start:stop], rtol=1e-5, atol=1e-6)


def test_codecs_approximate_the_difference(tmp_path: Path) -> None:
    tuned, base = make(tmp_path, torch.float32, torch.float32, 0.1)
    difference = tuned["large"].double().numpy() - base["large"].double().numpy()
    norm, found, sizes = np.linalg.norm(difference), {}, {}
    for codec in CODECS:
        path = tmp_path / f"{codec}.safetensors"
        write_delta(path, tuned, base, Codec(codec, rank=100))
        found[codec] = np.linalg.norm(opened(path)["large"].double().numpy() - difference) / norm
        sizes[codec] = path.stat().st_size / (tmp_path / "tuned.safetensors").stat().st_size
    best = np.sqrt((np.linalg.svd(difference, compute_uv=False)[100:] ** 2).sum()) / norm
    assert found["exact"] < 1e-6 and found["bf16"] < 2e-3
    assert best <= found["lowrank"] < 1.05 * best
    assert abs(found["1bit"] - np.sqrt(1 - 2 / np.pi)) < 0.01  # of a normal distribution
    assert sizes["bf16"] < 0.51 and sizes["lowrank"] < 0.12 and sizes["1bit"] < 0.05


@pytest.mark.parametrize("codec", ["lowrank", "1bit"])
def test_a_tensor_is_written_before_the_next_is_read(tmp_path: Path, codec: str, monkeypatch) -> None:
    tuned, base = make(tmp_path, torch.float32, torch.float32, 0.1)
    seen: list[str] = []
    read, write = SafetensorsFile.read_bytes, SafetensorsWriter.write

    def reading(file: SafetensorsFile, name: str, *rest: int):
        seen.append(name)
        return read(file, name, *rest)

    def writing(writer: SafetensorsWriter, part: str, *rest) -> None:
        seen.append(part.partition("::")[0])
        write(writer, part, *rest)

    monkeypatch.setattr(SafetensorsFile, "read_bytes", reading)
    monkeypatch.setattr(SafetensorsWriter, "write", writing)
    write_delta(tmp_path / "d.safetensors", tuned, base, Codec(codec, rank=4))
    assert [name for name, _ in groupby(seen)] == sorted(SHAPES)
    assert seen.count("large") == 2 + (2 if codec == "lowrank" else 3)


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"a::other": torch.ones(2)}, "no part of a delta"),
        ({"a::left": torch.ones(2, 2)}, "do not make a difference"),
        ({"a::left": torch.ones(2, 2), "a::right": torch.ones(3, 2)}, "do not make a matrix"),
        ({"a": torch.ones(2, dtype=torch.int64)}, "expected floating point"),
        ({"a": torch.ones(2), "a::index": torch.zeros(1).int(), "a::value": torch.ones(2)}, "places for"),
        (
            {"a::signs": torch.ones(2, 1).byte(), "a::scales": torch.ones(2), "a::shape": torch.tensor([2, 9])},
            "do not make",
        ),
    ],
)
def test_parts_that_make_no_difference_are_refused(tmp_path: Path, parts: dict, said: str) -> None:
    write_tensors(tmp_path / "d.safetensors", parts)
    with pytest.raises(InputError, match=said):
        opened(tmp_path / "d.safetensors")


@pytest.mark.parametrize("index", [[-1], [2], [1, 0], [0, 0]])
def test_corrections_outside_the_tensor_are_refused(tmp_path: Path, index: list[int]) -> None:
    places = torch.tensor(index, dtype=torch.int32)
    write_tensors(
        tmp_path / "d.safetensors", {"a": torch.ones(2), "a::index": places, "a::value": torch.ones(len(index))}
    )
    with pytest.raises(InputError, match="a::index"):
        opened(tmp_path / "d.safetensors").restore("a", torch.ones(2))


def test_an_unknown_codec_is_refused() -> None:
    with pytest.raises(InputError, match="zip"):
        Codec("zip")
