"""Adapted weights on disk: what is written is read back, what was changed is noticed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from recyclable.errors import InputError
from recyclable.weights.adapted import AdaptedWeights, write_manifest
from recyclable.weights.manifest import DELTA, HEAD, MANIFEST, Manifest, read_manifest

MANIFEST_CONTENT = Manifest(
    kind="delta",
    tuning={"tuning": "full"},
    task={"name": "t", "problem": "classification", "labels": ["a", "ü"], "digest": "d"},
    base={"name": "b", "fingerprint": {"weights": "w", "tokenizer": "t", "config": "c"}},
    method="both",
    metrics={"metric": "accuracy", "dev": {"accuracy": 0.1 + 0.2}, "test": {}},
    history=[{"step": 0, "examples": 0, "seconds": 0.0, "accuracy": 1 / 3}],
    settings={"seed": 20, "max_length": 24, "dropout": None},
    recycled_from={"allow_unrelated": False},
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_file({"x.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.ones(2)}, tmp_path / DELTA)
    save_file({"classifier.weight": torch.ones(2, 3)}, tmp_path / HEAD)
    write_manifest(tmp_path, MANIFEST_CONTENT)
    return tmp_path


def test_a_manifest_comes_back_as_it_was_with_digests_of_the_files(folder: Path) -> None:
    found = read_manifest(folder)
    assert set(found.files) == {DELTA, HEAD}
    assert {**vars(found), "files": {}} == vars(MANIFEST_CONTENT)
    assert not list(folder.glob(".*")), "nothing is left aside"


def test_tensors_come_one_by_one_in_the_order_of_their_names(folder: Path) -> None:
    opened = AdaptedWeights(folder)
    assert not opened.is_adapter
    assert [name for name, _ in opened.tensors(DELTA)] == ["a.bias", "x.weight"]
    assert torch.equal(dict(opened.tensors(DELTA))["x.weight"], torch.arange(6.0).reshape(2, 3))


@pytest.mark.parametrize("file", [DELTA, HEAD])
def test_a_changed_file_is_found(folder: Path, file: str) -> None:
    content = bytearray((folder / file).read_bytes())
    content[-1] ^= 128
    (folder / file).write_bytes(content)
    with pytest.raises(InputError, match=rf"{file}: was changed after it was written"):
        AdaptedWeights(folder)


def test_a_missing_file_is_found(folder: Path) -> None:
    (folder / HEAD).unlink()
    with pytest.raises(InputError, match=rf"{HEAD}: is missing"):
        AdaptedWeights(folder)


def test_files_outside_the_directory_are_never_looked_at(folder: Path) -> None:
    content = json.loads((folder / MANIFEST).read_text())
    content["files"] = {"../../etc/passwd": "0"}
    (folder / MANIFEST).write_text(json.dumps(content))
    with pytest.raises(InputError, match="is not understood"):
        AdaptedWeights(folder)


def test_labels_that_are_no_ascii_survive(folder: Path) -> None:
    assert read_manifest(folder).task["labels"] == ["a", "ü"]
