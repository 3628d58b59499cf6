"""A directory that does not hold what is wanted: the message says where in it that lies."""

from __future__ import annotations

from pathlib import Path

import pytest

from recyclable.errors import InputError
from recyclable.recipes.importing import import_weights
from recyclable.recipes.tuned_elsewhere import Told
from recyclable.weights.base import Base, read_config
from recyclable.weights.checkpoint_files import TensorFiles
from recyclable.weights.locate import inside
from recyclable.weights.manifest import read_manifest


def put(folder: Path, *files: str) -> Path:
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text("{}")
    return folder


def test_checkpoints_stand_in_their_order_and_only_some_of_many(tmp_path: Path) -> None:
    put(tmp_path, "runs/checkpoint-10/config.json", "runs/checkpoint-9/config.json", "logs/events", "a/b/c/config.json")
    said = "; found in it in runs/checkpoint-9, runs/checkpoint-10: name that directory"
    assert inside(tmp_path, "config.json") == said
    assert inside(tmp_path, "manifest.json") == inside(tmp_path / "absent", "config.json") == ""
    put(tmp_path, *(f"{i}/config.json" for i in range(8)))
    assert inside(tmp_path, "config.json") == "; found in it in 0, 1, 2, 3, 4, ...: name that directory"


def test_each_reader_says_where_what_it_wants_lies(tmp_path: Path) -> None:
    put(tmp_path, "checkpoint-3/config.json", "checkpoint-3/model.safetensors", "entry/manifest.json")
    for read, where in (
        (read_config, "has no config.json.*found in it in checkpoint-3:"),
        (Base, "has no config.json.*found in it in checkpoint-3:"),
        (TensorFiles, "no weights found.*found in it in checkpoint-3:"),
        (read_manifest, "holds no manifest.json.*found in it in entry:"),
    ):
        with pytest.raises(InputError, match=where):
            read(tmp_path)


@pytest.mark.parametrize("where", ["default/adapter_config.json", "checkpoint-3/config.json"])
def test_a_tuned_model_or_an_adapter_by_its_name_inside_what_is_given(
    tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("recyclable.recipes.importing.Base", lambda folder: folder)
    folder, into = put(tmp_path / "out", where), tmp_path / "into"
    said = f"out: has neither config.json nor adapter_config.json.*found in it in {Path(where).parent}: name"
    with pytest.raises(InputError, match=said):
        import_weights(folder, str(tmp_path), into, name="n", codec=None, task=None, told=Told())
