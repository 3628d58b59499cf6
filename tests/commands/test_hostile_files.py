"""Every small file that is read, spoiled in every way: one printable line names it, and nothing in it is opened."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from worlds import make_adapter, make_base, make_outdated, make_task, make_upgraded

from recyclable.adapters.configs import read_adapter_config
from recyclable.cli import main
from recyclable.config.run_file import read_run_file
from recyclable.errors import InputError
from recyclable.machine import load_ds_config
from recyclable.tasks.parts.asked import read_prompts
from recyclable.tasks.parts.task import load_task
from recyclable.weights.base import Base
from recyclable.weights.checkpoint_files import TensorFiles
from recyclable.weights.generation_file import read_generation
from recyclable.weights.lineage import read_lineage
from recyclable.weights.manifest import read_manifest
from recyclable.weights.vocabulary import load_tokenizer

PATIENCE_S = 60
"""Nothing here takes a second; what waits for a pipe would wait for ever."""
MARK = "RECYCLABLE_HOSTILE_FILE"


class Late(BaseException):
    """A reader waits for ever; nothing may take this for an error of its file."""


class Opened:
    """What a careless reader would run."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return exec, (f"import os; os.environ[{MARK!r}] = '1'",)


def bomb(levels: int = 40) -> bytes:
    """Aliases of aliases: 9^40 values."""
    lines = ["a0: &a0 [x]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, levels))]
    return "\n".join(lines).encode()


BYTES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda whole: b"",
    "truncated": lambda whole: whole[: len(whole) // 2],
    "noise": lambda whole: bytes(range(256)) * 4,
    "not UTF-8": lambda whole: whole.replace(b"a", b"\xff", 1),
    "NUL": lambda whole: whole.replace(b"a", b"\0", 1),
    "UTF-16": lambda whole: whole.decode().encode("utf-16"),
    "a list": lambda whole: b"[1, 2]",
    "a number": lambda whole: b"7",
    "null": lambda whole: b"null",
    "deep lists": lambda whole: b"[" * 20_000,
    "deep objects": lambda whole: b'{"a":' * 20_000,
    "closed deep lists": lambda whole: b'{"a": ' + b"[" * 10_000 + b"]" * 10_000 + b"}",
    "a long number": lambda whole: b'{"train_batch_size": ' + b"9" * 6000 + b"}",
    "bomb": lambda whole: bomb(),
    "python": lambda whole: b"!!python/object/apply:os.system ['true']",
    "pickle": lambda whole: pickle.dumps(Opened()),
    "escapes": lambda whole: b'{"\\u001b[31m\\u202e": 1, "train": "\\u001b]0;x\\u0007"}',
}
PLACES: dict[str, Callable[[Path], object]] = {
    "a directory": Path.mkdir,
    "a pipe": os.mkfifo,
    "a circle": lambda path: path.symlink_to(path.name),
    "vast": lambda path: os.truncate(os.open(path, os.O_CREAT | os.O_WRONLY), 1 << 40),
}
NEVER_READ = {"empty", "truncated", "noise", "deep lists", "deep objects", "pickle", "a list", "vast"}
"""What no reader takes; for the rest it is enough that they end well."""

READERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "run config": ("run.yaml", read_run_file),
    "task file": ("task/task.yaml", lambda path: load_task(path.parent)),
    "ds_config": ("ds.json", load_ds_config),
    "config": ("base/config.json", lambda path: Base(path.parent)),
    "tokenizer": ("base/tokenizer.json", lambda path: load_tokenizer(path.parent)),
    "generation": ("base/generation_config.json", lambda path: read_generation(path.parent)),
    "lineage": ("upgraded/lineage.json", lambda path: read_lineage(path.parent)),
    "index": ("sharded/model.safetensors.index.json", lambda path: TensorFiles(path.parent)),
    "manifest": ("weights/manifest.json", lambda path: read_manifest(path.parent)),
    "adapter": ("adapter/adapter_config.json", lambda path: read_adapter_config(path.parent)),
    "prompts": ("prompts.jsonl", read_prompts),
    "train": ("task/train.jsonl", lambda path: load_task(path.parent)),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Whole files, in place."""
    root = tmp_path_factory.mktemp("world")
    base, task = make_base(root / "base"), make_task(root / "task", train=12, dev=6, test=6)
    (base / "generation_config.json").write_text('{"max_length": 20}')
    make_upgraded(base, root / "upgraded")
    make_outdated(base, task, root / "weights")
    make_adapter(base, task, root / "adapter", "lora")
    files = {"train": "train.jsonl", "dev": "dev.jsonl", "labels": ["left", "middle", "right"]}
    (task / "task.yaml").write_text(yaml.safe_dump(files))
    (root / "run.yaml").write_text(yaml.safe_dump({"base": "a", "task": "b", "seed": 3}))
    (root / "ds.json").write_text(json.dumps({"train_batch_size": 8, "bf16": {"enabled": True}}))
    (root / "prompts.jsonl").write_text('{"prompt": "a question"}\n' * 3)
    sharded = root / "sharded"
    sharded.mkdir()
    (base / "model.safetensors").rename(sharded / "part-a.safetensors")
    os.link(sharded / "part-a.safetensors", base / "model.safetensors")
    names = TensorFiles(base).names
    index = {"weight_map": dict.fromkeys(names, "part-a.safetensors")}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    return root


@pytest.fixture(autouse=True)
def patience() -> Iterator[None]:
    """A reader that waits for ever fails."""

    def late(*_: object) -> None:
        raise Late

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(PATIENCE_S)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def spoiled(world: Path, reader: str) -> Iterator[Path]:
    """The file, gone; whole again afterwards."""
    path = world / READERS[reader][0]
    whole = path.read_bytes()
    path.unlink()
    path.with_suffix(".whole").write_bytes(whole)
    yield path
    if path.is_dir() and not path.is_symlink():
        path.rmdir()
    path.unlink(missing_ok=True)
    path.with_suffix(".whole").rename(path)


@pytest.mark.parametrize("reader", READERS)
def test_whole_files_are_read(world: Path, reader: str) -> None:
    file, read = READERS[reader]
    assert read(world / file) is not None


@pytest.mark.parametrize("reader", READERS)
def test_a_spoiled_file_is_refused_in_one_line(
    spoiled: Path, reader: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(MARK, raising=False)
    read, whole = READERS[reader][1], spoiled.with_suffix(".whole").read_bytes()
    for way in [*BYTES, *PLACES]:
        if way == "a pipe" and reader == "run config":  # `recyclable tune <(generated)` is fine
            continue
        if way in BYTES:
            spoiled.write_bytes(BYTES[way](whole))
        else:
            PLACES[way](spoiled)
        said = _refused(read, spoiled)
        assert MARK not in os.environ
        assert said is not None or way not in NEVER_READ, way
        assert said is None or (said.isprintable() and len(said) < 3000), way
        assert capsys.readouterr().out.replace("\n", "").isprintable()
        spoiled.rmdir() if spoiled.is_dir() and not spoiled.is_symlink() else spoiled.unlink()


def _refused(read: Callable[[Path], object], path: Path) -> str | None:
    """What a reader says of a file that it does not take; anything but InputError fails the test."""
    try:
        read(path)
    except InputError as error:
        return str(error)
    return None


def test_escape_sequences_of_a_record_do_not_reach_the_terminal(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store, hostile = tmp_path / "store", "\x1b]0;owned\x07\x9b31m\u202eevil"
    shutil.copytree(world / "weights", store / "n")
    content = json.loads((store / "n" / "manifest.json").read_text())
    content["task"]["name"] = content["base"]["name"] = hostile
    (store / "n" / "manifest.json").write_text(json.dumps(content))
    (store / "n" / "manifest.sha256").unlink(missing_ok=True)
    upgraded = Path(shutil.copytree(world / "upgraded", tmp_path / "upgraded"))
    lineage = json.loads((upgraded / "lineage.json").read_text())
    lineage["ancestors"][0]["name"] = hostile
    (upgraded / "lineage.json").write_text(json.dumps(lineage))
    for argv in (
        ["store", "ls", "--store", store],
        ["store", "show", "n", "--store", store],
        ["lineage", "show", upgraded],
    ):
        capsys.readouterr()
        assert main([str(word) for word in argv]) == 0
        said = capsys.readouterr().out
        assert "evil" in said and said.replace("\n", "").isprintable()
