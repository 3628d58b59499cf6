"""Files are whole or absent, and safetensors written tensor by tensor are what the library reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from recyclable.weights import durable
from recyclable.weights.checkpoint_files import SafetensorsFile, TensorFiles
from recyclable.weights.durable import new_directory, write_json
from recyclable.weights.files import write_safetensors, write_tensors

DTYPES = [
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
]


def tensors() -> dict[str, torch.Tensor]:
    made = {f"of {dtype}": (torch.randn(3, 5) * 10).to(dtype) for dtype in DTYPES}
    return {
        **made,
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
        "turned": torch.randn(4, 3).t(),
        "ü": torch.ones(1),
    }


def test_every_dtype_and_shape_is_read_back_by_safetensors(tmp_path: Path) -> None:
    written = tensors()
    write_tensors(tmp_path / "model.safetensors", written)
    found = load_file(tmp_path / "model.safetensors")
    assert found.keys() == written.keys()
    for name, tensor in written.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
    assert SafetensorsFile(tmp_path / "model.safetensors").metadata == {"format": "pt"}
    opened = TensorFiles(tmp_path)
    assert opened.names == sorted(written) and opened.shape("turned") == (3, 4)


def test_data_begin_at_a_multiple_of_8_bytes(tmp_path: Path) -> None:
    for length in range(1, 10):
        write_tensors(tmp_path / "f", {"n" * length: torch.ones(1)})
        assert int.from_bytes((tmp_path / "f").read_bytes()[:8], "little") % 8 == 0


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["b", "a"], "got b"),
        (["a"], "b was announced and never came"),
        (["a", "b", "c"], "got c"),
        ([], "a was announced and never came"),
    ],
)
def test_tensors_that_are_not_what_was_announced_are_refused(tmp_path: Path, given: list[str], said: str) -> None:
    shapes = {"a": (torch.float32, (2,)), "b": (torch.float32, (2,))}
    with pytest.raises(ValueError, match=said):
        write_safetensors(tmp_path / "f", shapes, ((name, torch.ones(2)) for name in given))
    assert not (tmp_path / "f").exists()


@pytest.mark.parametrize("tensor", [torch.ones(3), torch.ones(2).half(), torch.ones(1, 2)])
def test_another_shape_or_dtype_than_announced_is_refused(tmp_path: Path, tensor: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="got a"):
        write_safetensors(tmp_path / "f", {"a": (torch.float32, (2,))}, [("a", tensor)])


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    write_tensors(tmp_path / "f", {"a": torch.ones(1)})
    with pytest.raises(ValueError):
        write_safetensors(tmp_path / "f", {"a": (torch.float32, (1,))}, [("b", torch.ones(1))])
    assert load_file(tmp_path / "f").keys() == {"a"}


def test_json_replaces_in_one_go(tmp_path: Path) -> None:
    write_json(tmp_path / "f.json", {"b": 1, "path": tmp_path})
    write_json(tmp_path / "f.json", {"a": 2})
    assert json.loads((tmp_path / "f.json").read_text()) == {"a": 2}
    assert [path.name for path in tmp_path.iterdir()] == ["f.json"]


def test_everything_in_a_new_directory_is_synced_before_it_gets_its_name(tmp_path: Path, monkeypatch) -> None:
    synced, rename = set(), Path.rename
    monkeypatch.setattr(durable, "sync", lambda path: synced.add(path.name))

    def renaming(aside: Path, folder: Path) -> Path:
        assert synced == {"config.json", "inner", "weights", aside.name}
        return rename(aside, folder)

    monkeypatch.setattr(Path, "rename", renaming)
    with new_directory(tmp_path / "new") as aside:
        (aside / "inner").mkdir()
        for name in ("config.json", "inner/weights"):
            (aside / name).write_text("x")
        assert synced == set()
    assert synced > {"config.json"} and (tmp_path / "new" / "inner" / "weights").read_text() == "x"
