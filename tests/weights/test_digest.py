"""Hash trees: the same for every way of reading, different for any flipped bit; hashed exactly what was read."""

from __future__ import annotations

import hashlib
import itertools
import random
import time
from pathlib import Path

import blake3
import pytest
import torch

from recyclable.weights.checkpoint_files import SafetensorsFile
from recyclable.weights.digest import LEAF, Digested, element_pieces, file_digest, in_threads
from recyclable.weights.files import write_tensors

SIZES = {"empty": 0, "one": 1, "leaf": LEAF // 4, "over": LEAF // 4 + 1, "large": 5 * LEAF // 4 - 7}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("digest") / "t.safetensors"
    draw = torch.Generator().manual_seed(0)
    write_tensors(path, {name: torch.randn(size, generator=draw) for name, size in SIZES.items()})
    return path


def plain_digest(name: str, tensor: torch.Tensor) -> str:
    data = tensor.numpy().tobytes()
    leaves = [blake3.blake3(data[i : i + LEAF]).digest() for i in range(0, len(data), LEAF)]
    return hashlib.sha256(f"{name}|torch.float32|({len(tensor)},)|".encode() + b"".join(leaves)).hexdigest()


def test_digests_are_the_ones_of_a_plain_loop(path: Path) -> None:
    file = SafetensorsFile(path)
    assert Digested(file).tensor_digests() == {name: plain_digest(name, file[name]) for name in file.names}


def test_any_cut_into_ranges_gives_the_same_values_and_hashes_each_leaf_once(path: Path, monkeypatch) -> None:
    draw, whole = random.Random(1), Digested(SafetensorsFile(path)).tensor_digests()
    for _ in range(20):
        hashed = []
        monkeypatch.setattr(
            "recyclable.weights.digest.blake3", lambda data, h=hashed: h.append(1) or blake3.blake3(data)
        )
        opened = Digested(SafetensorsFile(path))
        for name, size in SIZES.items():
            cuts = sorted({0, size, *(draw.randrange(size + 1) for _ in range(4))})
            parts = [opened.read(name, a, b) for a, b in itertools.pairwise(cuts)]
            if parts:
                assert torch.equal(torch.cat(parts), SafetensorsFile(path).read(name))
        monkeypatch.undo()
        assert len(hashed) == sum(-(-4 * size // LEAF) for size in SIZES.values())
        opened.source = None  # nothing is left to be read
        for name, size in SIZES.items():
            assert opened.leaves[name].all_known(0, -(-4 * size // LEAF)), name
        again = Digested(SafetensorsFile(path))
        again.leaves = opened.leaves
        assert again.tensor_digests() == whole


def test_ranks_that_read_their_shares_know_all_leaves_together(path: Path) -> None:
    shares = []
    for rank in range(3):
        opened = Digested(SafetensorsFile(path))
        for name, size in SIZES.items():
            share = -(-size // 3)
            opened.read(name, min(size, rank * share), min(size, (rank + 1) * share))
        shares.append(opened.leaves)
    together = Digested(SafetensorsFile(path))
    for leaves in shares:
        for name, own in leaves.items():
            for first, digests in own.runs():
                assert not any(
                    together.leaves[name].all_known(i, i + 1) for i in range(first, first + len(digests) // 32)
                )
            together.leaves[name].add(own.runs())
    assert together.file_digest() == file_digest(path)


def test_every_flipped_bit_changes_the_digest(path: Path, tmp_path: Path) -> None:
    whole, data, draw = file_digest(path), path.read_bytes(), random.Random(2)
    header = 8 + int.from_bytes(data[:8], "little")
    for place in [*(draw.randrange(header, len(data)) for _ in range(10)), header, len(data) - 1]:
        flipped = bytearray(data)
        flipped[place] ^= 1 << draw.randrange(8)
        (tmp_path / "f.safetensors").write_bytes(flipped)
        assert file_digest(tmp_path / "f.safetensors") != whole


def test_pieces_cover_every_element_once_and_end_with_a_leaf() -> None:
    shapes = {"a": (3, 1 << 20), "b": (5,), "none": (0, 4), "scalar": ()}
    found: dict[str, int] = {}
    for name, start, stop in element_pieces(shapes):
        assert start == found.get(name, 0) and start * 2 % LEAF == 0
        found[name] = stop
    assert found == {"a": 3 << 20, "b": 5, "scalar": 1}


def test_a_failure_in_a_thread_is_raised_and_ends_the_rest() -> None:
    done = []

    def work(i: int) -> None:
        if i == 3:
            raise ValueError("three")
        time.sleep(0.01)  # tasks that are over before the first failure is seen could not be stopped
        done.append(i)

    with pytest.raises(ValueError, match="three"):
        in_threads(work, range(2_000))
    assert len(done) < 1_999
