"""The store: entries are whole or absent, whoever writes, reads, crashes or flips a bit; names are no paths."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from processes import ROOT
from worlds import make_base, make_outdated, make_task

from recyclable.errors import InputError
from recyclable.weights.adapted import AdaptedWeights, write_manifest
from recyclable.weights.durable import new_directory
from recyclable.weights.manifest import DELTA, HEAD, MANIFEST, SEAL, read_manifest
from recyclable.weights.store import VARIABLE, Store, find


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapted weights to add."""
    root = tmp_path_factory.mktemp("store")
    base = make_base(root / "base", hidden=16, layers=1)
    return make_outdated(base, make_task(root / "task", train=9, dev=9, test=9), root / "run")


def put(store: Store, name: str, run: Path) -> None:
    with store.adding(name) as aside:
        for file in (DELTA, HEAD):
            shutil.copyfile(run / file, aside / file)
        write_manifest(aside, read_manifest(run))


@pytest.fixture
def store(run: Path, tmp_path: Path) -> Store:
    store = Store(tmp_path / "store")
    put(store, "first", run)
    return store


def test_an_entry_is_adapted_weights_with_a_sealed_manifest(store: Store, run: Path) -> None:
    assert store.names() == ["first"] and store.damage("first") == []
    files = {path.name for path in store.path("first").iterdir()}
    assert files == {MANIFEST, SEAL, DELTA, HEAD}
    assert AdaptedWeights(store.path("first")).manifest == AdaptedWeights(run).manifest
    assert [path.name for path in store.folder.iterdir()] == ["first"], "nothing is left aside"


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", "/x", ".hidden", "a b", "ä", "a\n", "x" * 101, "-x"])
def test_a_name_is_never_a_path(store: Store, run: Path, name: str) -> None:
    with pytest.raises(InputError, match="expected letters"):
        put(store, name, run)
    with pytest.raises(InputError, match="expected letters"):
        store.path(name)
    assert store.names() == ["first"]


def test_an_entry_is_never_changed(store: Store, run: Path) -> None:
    before = {path: path.read_bytes() for path in store.path("first").iterdir()}
    with pytest.raises(InputError, match=r"first: is in .*store already"):
        put(store, "first", run)
    assert {path: path.read_bytes() for path in store.path("first").iterdir()} == before


def test_weights_are_found_by_directory_then_by_name(
    store: Store, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(VARIABLE, raising=False)
    assert find("first") == Path("store/first"), "./store is the default"
    assert find(run, store.folder) == run
    (tmp_path / "first").mkdir()
    assert find("first") == Path("store/first"), "a directory of that name that is something else"
    assert find(tmp_path / "first", store.folder) == tmp_path / "first", "who reads it says what it lacks"
    (tmp_path / "first" / "manifest.json").touch()
    assert find("first") == Path("first")
    shutil.rmtree(tmp_path / "first")
    monkeypatch.setenv(VARIABLE, str(tmp_path / "elsewhere"))
    assert find("first", store.folder) == store.path("first"), "what is named goes before the environment"
    with pytest.raises(InputError, match=r"first: is no directory .* nor a name in .*elsewhere, which has nothing"):
        find("first")
    with pytest.raises(InputError, match=r"second: is no directory .*, which has first"):
        find("second", store.folder)
    with pytest.raises(InputError, match="is no directory"):
        find("store/../nowhere", store.folder)


def test_any_flipped_bit_is_found_and_named(store: Store) -> None:
    draw, folder = random.Random(0), store.path("first")
    for path in sorted(folder.iterdir()):
        whole = path.read_bytes()
        for place in {0, 7, 8, len(whole) - 1, *draw.sample(range(len(whole)), 12)} & set(range(len(whole))):
            for bit in (0, draw.randrange(8)):
                path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
                named = str(folder / MANIFEST) if path.name == SEAL else str(path)
                assert any(named in problem for problem in store.damage("first")), (path.name, place, bit)
        path.write_bytes(whole)
    assert store.damage("first") == []


def test_other_damage_is_named(store: Store, tmp_path: Path) -> None:
    folder = store.path("first")
    (folder / "notes.txt").write_text("hello")
    assert store.damage("first") == [f"{folder / 'notes.txt'}: does not belong to the entry"]
    (folder / "notes.txt").unlink()
    (folder / HEAD).rename(tmp_path / "kept")
    assert f"{folder / HEAD}: is missing" in store.damage("first")
    (folder / HEAD).symlink_to(tmp_path / "kept")
    assert store.damage("first")[0].startswith(f"{folder / HEAD}: is a link out of")
    with pytest.raises(InputError, match=r"is a link out of the model.s directory"):
        AdaptedWeights(folder)
    (folder / HEAD).unlink()
    (tmp_path / "kept").rename(folder / HEAD)
    (folder / SEAL).unlink()
    assert store.damage("first") == [f"{folder / SEAL}: is missing"]


def test_a_manifest_that_is_not_the_sealed_one_is_refused_wherever_it_is_read(store: Store) -> None:
    manifest = store.path("first") / MANIFEST
    content = json.loads(manifest.read_text())
    content["base"]["fingerprint"]["weights"] = "0" * 64
    manifest.write_text(json.dumps(content))
    with pytest.raises(InputError, match=rf"{MANIFEST}: was changed after it was written"):
        AdaptedWeights(store.path("first"))


def test_of_several_who_add_one_name_the_first_wins(run: Path, tmp_path: Path) -> None:
    def one(number: int) -> str:
        store = Store(tmp_path / "store")
        try:
            put(store, "same" if number % 2 else f"own{number}", run)
        except InputError as error:
            return str(error)
        assert store.damage(f"own{number}") == [] if number % 2 == 0 else True
        return "added"

    with ThreadPoolExecutor(8) as pool:
        said = list(pool.map(one, range(16)))
    assert all(answer == "added" for answer in said[::2])
    assert sorted(answer == "added" for answer in said[1::2]) == [False] * 7 + [True]
    assert all("same: is in " in answer for answer in said[1::2] if answer != "added")
    store = Store(tmp_path / "store")
    assert store.names() == sorted(["same", *(f"own{n}" for n in range(0, 16, 2))])
    assert not any(store.damage(name) for name in store.names())
    assert not list(store.folder.glob(".*"))


KILLED = """
import os, shutil, signal, sys
from pathlib import Path
from recyclable.weights.store import Store
from recyclable.weights.adapted import write_manifest
from recyclable.weights.manifest import read_manifest
run, store, name, point = sys.argv[1:]
if point == "renaming":
    Path.rename = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
with Store(store).adding(name) as aside:
    for file in ("delta.safetensors", "head.safetensors"):
        shutil.copyfile(Path(run) / file, aside / file)
        if point == "copying":
            os.kill(os.getpid(), signal.SIGKILL)
    write_manifest(aside, read_manifest(Path(run)))
"""


def test_who_is_killed_in_the_middle_leaves_what_was_there(store: Store, run: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for point in ("copying", "renaming"):
        arguments = [sys.executable, "-c", KILLED, str(run), str(store.folder), "second", point]
        assert subprocess.run(arguments, env=environment, capture_output=True, timeout=120).returncode == -9
    leftovers = list(store.folder.glob(".second.partial-*"))
    assert len(leftovers) == 1, "the second writer cleared what the first left"
    assert store.names() == ["first"] and store.damage("first") == []
    put(store, "second", run)
    assert store.names() == ["first", "second"] and store.damage("second") == []
    assert not leftovers[0].exists()


def test_what_a_living_writer_has_aside_is_left_alone(store: Store, run: Path) -> None:
    with new_directory(store.folder / "slow") as aside:
        put(store, "second", run)
        assert aside.is_dir() and store.names() == ["first", "second"]
        shutil.copyfile(run / HEAD, aside / HEAD)
    assert "slow" in store.names()


def test_a_failure_leaves_no_store_behind(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), Store(tmp_path / "new" / "store").adding("x"):
        raise RuntimeError
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("place", ["/proc/x", "/dev/null/x", "a\0b"])
def test_a_store_that_cannot_be_made_is_refused(run: Path, place: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot be written \(.+\), expected a directory"):
        put(Store(place if place.startswith("/") else tmp_path / place), "n", run)
    assert not list(tmp_path.iterdir())


def test_what_is_no_directory_is_no_entry_and_long_lists_are_cut(store: Store) -> None:
    (store.folder / "notes.txt").write_text("hello")
    (store.folder / "dangling").symlink_to("nowhere")
    (store.folder / "other").symlink_to("first")
    assert store.names() == ["first"]
    for number in range(30):
        (store.folder / f"n{number:02}").mkdir()
    with pytest.raises(InputError, match=r"holds no 'x', only first, n00, .*, n18, 11 more$"):
        store.path("x")
    with pytest.raises(InputError, match=r"which has first, n00, .*, n18, 11 more$"):
        find("x", store.folder)
