"""Checkpoints taken apart: what the base has and what it lacks, every mismatch listed; what a codec loses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from worlds import make_base

from recyclable.errors import InputError
from recyclable.weights.base import Base
from recyclable.weights.checkpoint_files import SafetensorsFile, TensorFiles
from recyclable.weights.convert import Places, Restored, loss, split
from recyclable.weights.delta import CODECS, Codec, Delta, write_delta
from recyclable.weights.digest import Digested

HEAD = {"classifier.weight": (3, 16), "pooler.dense.bias": (16,)}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return Base(make_base(tmp_path_factory.mktemp("convert") / "base", hidden=16, layers=1))


def tuned(base: Base, folder: Path, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """A checkpoint with a head, by the names that stand in the file."""
    draw = torch.Generator().manual_seed(0)
    tensors = {f"bert.{n}": (base[n] + 0.02 * torch.randn(base.shape(n), generator=draw)).to(dtype) for n in base.names}
    tensors["classifier.weight"] = torch.ones(3, 16, dtype=dtype)
    tensors["bert.pooler.dense.bias"] = torch.ones(16, dtype=dtype)
    write(folder, tensors)
    return tensors


def write(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def places(base: Base, backbone: Sequence[str] = (), aliases: Sequence[str] = ()) -> Places:
    shapes = {**{name: base.shape(name) for name in base.names}, **HEAD}
    return Places(shapes, frozenset([*base.names, *backbone]), frozenset(aliases))


def test_the_base_s_tensors_and_the_head(base: Base, tmp_path: Path) -> None:
    tensors = tuned(base, tmp_path / "t")
    tensors["bert.embeddings.position_ids"] = torch.arange(4)
    tensors["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"].clone()
    write(tmp_path / "t", tensors)
    body, head = split(TensorFiles(tmp_path / "t"), base, places(base, aliases=["cls.predictions.decoder.weight"]))
    assert body.names == sorted(base.names) and head.names == sorted(HEAD)
    assert all(torch.equal(body[n], tensors[f"bert.{n}"]) for n in body.names)


def test_every_mismatch_is_listed_at_once(base: Base, tmp_path: Path) -> None:
    tensors = tuned(base, tmp_path / "t")
    del tensors["bert.encoder.layer.0.output.dense.weight"], tensors["classifier.weight"]
    tensors["bert.embeddings.LayerNorm.bias"] = torch.ones(17)
    tensors["bert.pooler.dense.bias"] = torch.ones(4)
    tensors["bert.encoder.layer.7.output.dense.weight"] = torch.ones(2)
    tensors["embeddings.LayerNorm.weight"] = torch.ones(16)
    write(tmp_path / "t", tensors)
    with pytest.raises(InputError) as caught:
        split(TensorFiles(tmp_path / "t"), base, places(base, backbone=["encoder.layer.9.x"]))
    for problem in (
        "the base lacks encoder.layer.9.x",
        "; encoder.layer.0.output.dense.weight is missing",
        "; classifier.weight is missing",
        "bert.embeddings.LayerNorm.bias is (17,), the base's (16,)",
        "bert.pooler.dense.bias is (4,), the architecture's (16,)",
        "bert.encoder.layer.7.output.dense.weight has no place in the architecture",
        "embeddings.LayerNorm.weight and bert.embeddings.LayerNorm.weight are the same tensor's",
    ):
        assert problem.lstrip("; ") in str(caught.value), problem


@pytest.mark.parametrize(("rows", "tokens"), [(210, 200), (203, 190), (190, 190), (190, 185)])
def test_rows_without_tokens_are_left_out_or_the_base_s(base: Base, tmp_path: Path, rows: int, tokens: int) -> None:
    tensors, name = tuned(base, tmp_path / "t", torch.bfloat16), "bert.embeddings.word_embeddings.weight"
    own = tensors[name] = torch.cat([tensors[name], torch.ones(10, 16, dtype=torch.bfloat16)])[:rows].clone()
    write(tmp_path / "t", tensors)
    name, room = name.removeprefix("bert."), places(base)
    room = replace(room, shapes={**room.shapes, name: (rows, 16)})
    body, _ = split(TensorFiles(tmp_path / "t"), base, room, tokens=tokens)
    wanted = torch.cat([own, base[name][rows:].bfloat16()])[:200].flatten()
    assert body.shape(name) == (200, 16) and torch.equal(body[name].flatten(), wanted)
    for start, stop in ((0, 5), (188 * 16 + 3, 191 * 16 + 1), (3199, 3200), (190 * 16, 190 * 16), (3000, None)):
        assert torch.equal(body.read(name, start, stop), wanted[start:stop])
    unsure = (f"has {rows} rows, the base's 200, for 201 tokens", 201), (f"has {rows} rows.*no tokenizer", None)
    for said, count in unsure:
        with pytest.raises(InputError, match=said):
            split(TensorFiles(tmp_path / "t"), base, room, tokens=count)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_is_that_of_numpy_in_float64(base: Base, tmp_path: Path, codec: str, dtype: torch.dtype) -> None:
    tensors = tuned(base, tmp_path / "t", dtype)
    body, _ = split(TensorFiles(tmp_path / "t"), base, places(base))
    write_delta(tmp_path / "d.safetensors", body, base, Codec(codec, rank=2))
    delta = Delta(Digested(SafetensorsFile(tmp_path / "d.safetensors")))
    found = loss(delta, body, base)
    restored = Restored(delta, base)

    def norm(values) -> float:
        return float(np.sqrt(sum((v.double().numpy() ** 2).sum() for v in values)))

    want = [tensors[f"bert.{n}"] for n in delta.names]
    wrong = norm([restored[n].double() - w.double() for n, w in zip(delta.names, want, strict=True)])
    moved = norm([w.double() - base[n].double() for n, w in zip(delta.names, want, strict=True)])
    assert found["weights"] == pytest.approx(wrong / norm(want), rel=1e-9)
    assert found["difference"] == pytest.approx(wrong / moved, rel=1e-9)
    assert (found["weights"] == 0) == (codec == "exact")
    assert all(restored[n].dtype == dtype for n in delta.names)


def test_an_exact_delta_loses_no_infinity_either(base: Base, tmp_path: Path) -> None:
    tensors = tuned(base, tmp_path / "t")
    tensors["bert.embeddings.LayerNorm.bias"][:3] = torch.tensor([torch.inf, -torch.inf, torch.nan])
    write(tmp_path / "t", tensors)
    body, _ = split(TensorFiles(tmp_path / "t"), base, places(base))
    write_delta(tmp_path / "d.safetensors", body, base, Codec())
    lost = loss(Delta(Digested(SafetensorsFile(tmp_path / "d.safetensors"))), body, base)
    assert lost["weights"] == 0
