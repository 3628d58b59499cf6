"""Links in a model's directory: those that lead out of it are refused, others are followed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from worlds import make_adapter, make_base, make_outdated, make_task

from recyclable.adapters.configs import read_adapter_config
from recyclable.errors import InputError
from recyclable.weights.base import Base, read_config
from recyclable.weights.manifest import read_manifest
from recyclable.weights.vocabulary import load_tokenizer


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("world")
    base, task = make_base(root / "base"), make_task(root / "task", train=30, dev=12, test=12)
    make_outdated(base, task, root / "weights")
    make_adapter(base, task, root / "adapter", "lora")
    return root


READERS = {
    "config": ("base", read_config),
    "base": ("base", Base),
    "tokenizer": ("base", lambda folder: load_tokenizer(folder, read_config(folder.parent / "whole"))),
    "manifest": ("weights", read_manifest),
    "adapter": ("adapter", read_adapter_config),
}


@pytest.mark.parametrize(
    "name", ["vocab-key.txt", "tokenizer.json", "additional_chat_templates/a.jinja", "x.safetensors"]
)
@pytest.mark.parametrize(("kind", "read"), READERS.values(), ids=READERS)
def test_a_link_out_is_not_followed(world: Path, tmp_path: Path, kind: str, read, name: str) -> None:
    folder, secret = tmp_path / kind, tmp_path / "secret"
    shutil.copytree(world / kind, folder)
    shutil.copytree(world / "base", tmp_path / "whole")
    read(folder)
    secret.write_text("private")
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(secret)
    with pytest.raises(InputError, match="is a link out of the model's directory, which is not followed") as caught:
        read(folder)
    assert str(folder / name) in str(caught.value) and "private" not in str(caught.value)


def test_a_linked_folder_of_templates_is_not_followed(world: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(world / "base", tmp_path / "base"))
    (tmp_path / "elsewhere").mkdir()
    (folder / "additional_chat_templates").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="additional_chat_templates: is a link out of the model's directory"):
        read_config(folder)


def test_links_in_a_circle_are_refused(world: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(world / "base", tmp_path / "base"))
    (folder / "a.json").symlink_to(folder / "b.json")
    (folder / "b.json").symlink_to(folder / "a.json")
    with pytest.raises(InputError, match=r"[ab]\.json: is a link that leads nowhere"):
        read_config(folder)


def test_links_within_and_a_linked_directory_are_followed(world: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(world / "base", tmp_path / "base"))
    (folder / "tokenizer.json").rename(folder / "real.json")
    (folder / "tokenizer.json").symlink_to("real.json")
    (tmp_path / "link").symlink_to(folder)
    assert len(load_tokenizer(tmp_path / "link")) == len(load_tokenizer(world / "base"))


def test_the_hubs_cache_is_made_of_links(world: Path, tmp_path: Path) -> None:
    model = tmp_path / "models--somebody--base"
    snapshot, blobs = model / "snapshots" / "abc", model / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in (world / "base").iterdir():
        shutil.copy(file, blobs / f"digest-{file.name}")
        (snapshot / file.name).symlink_to(Path("../../blobs") / f"digest-{file.name}")
    assert Base(snapshot).names == Base(world / "base").names
    (tmp_path / "secret").write_text("private")
    (snapshot / "extra.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(InputError, match="is a link out of the model's directory"):
        Base(snapshot)
