"""Faults: checkpoints of several ranks written by hand, ways to damage one, death inside the n-th file operation."""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from recyclable.training import best
from recyclable.training.checkpoint.choosing import FOLDER, newest_whole
from recyclable.training.checkpoint.rank_file import write_pieces
from recyclable.training.checkpoint.record import Progress, RankFile, Record, rank_file, write_record
from recyclable.training.checkpoint.saving import Saver
from recyclable.training.pieces import MOMENTS, WEIGHT, Piece
from recyclable.weights.digest import file_digest
from recyclable.weights.files import write_tensors

LAYOUT = {"words.weight": [7, 5], "layer.bias": [3], "scale": []}
State = dict[str, dict[str, torch.Tensor]]
"""Kind -> name -> values."""


def state_of(step: int) -> State:
    """What a run had at a step."""
    generator = torch.Generator().manual_seed(step)
    return {
        kind: {name: torch.randn(shape, generator=generator) for name, shape in LAYOUT.items()}
        for kind in (WEIGHT, *MOMENTS)
    }


def pieces_of(step: int, rank: int = 0, ranks: int = 1) -> list[Piece]:
    """A rank's share of it."""
    state, pieces = state_of(step), []
    for name, values in state[WEIGHT].items():
        start, stop = (values.numel() * r // ranks for r in (rank, rank + 1))
        tensors = {kind: state[kind][name].flatten()[start:stop].clone() for kind in state}
        pieces += [Piece(name, start, tensors, float(step))] if start < stop else []
    return pieces


def record_of(step: int, out: Path, ranks: int = 1) -> Record:
    """Its record, without files; the best step's weights are written."""
    file = best.tensors_file(out, step)
    write_tensors(file, state_of(step)[WEIGHT])
    row = {"step": step, "examples": step, "seconds": 1.5, "loss": 1.0}
    progress = Progress(step, 1.5, step, 0.25, file_digest(file), [row])
    return Record(progress, {"base": "b" * 64}, LAYOUT, {}, zero_stage=2, precision="fp32", ranks=ranks, micro_batch=4)


def write_checkpoint(out: Path, step: int, ranks: int = 1) -> Path:
    """A whole checkpoint of several ranks."""
    folder = out / FOLDER / f"step-{step:08d}"
    folder.mkdir(parents=True)
    record = record_of(step, out, ranks)
    for rank in range(ranks):
        file = folder / rank_file(rank)
        digest = write_pieces(file, pieces_of(step, rank, ranks))
        record.files[file.name] = RankFile(file.stat().st_size, digest)
    write_record(folder, record)
    return folder


def save_one(out: Path, step: int, keep: int = 2) -> None:
    """As a run would."""
    with Saver(out, every=1, keep=keep) as saver:
        saver.save(record_of(step, out), pieces_of(step))


def loaded(out: Path) -> int | None:
    """The step that a run would go on from; AssertionError if what it would load is not that step's state."""
    found = newest_whole(out, LAYOUT)
    if found is None:
        return None
    step = found.record.progress.step
    for kind, tensors in state_of(step).items():
        for name, values in tensors.items():
            assert torch.equal(found.files.kind(kind)[name], values), (step, kind, name)
    assert {found.files.steps(name) for name in LAYOUT} == {step}
    return step


# ---- damage ------------------------------------------------------------------------------------------------------


def _any_file(folder: Path, draw: random.Random) -> Path:
    return draw.choice(sorted(path for path in folder.iterdir() if path.is_file()))


def truncate(folder: Path, draw: random.Random) -> None:
    """Some file ends early."""
    file = _any_file(folder, draw)
    os.truncate(file, draw.randrange(file.stat().st_size))


def flip_a_bit(folder: Path, draw: random.Random) -> None:
    """Of some file."""
    file = _any_file(folder, draw)
    data = bytearray(file.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    file.write_bytes(data)


def remove_a_file(folder: Path, draw: random.Random) -> None:
    """Any of them."""
    _any_file(folder, draw).unlink()


def take_from_another_step(folder: Path, draw: random.Random) -> None:
    """Some file is an earlier step's."""
    file = _any_file(folder, draw)
    others = sorted(path for path in folder.parent.glob("step-*") if path != folder and (path / file.name).is_file())
    shutil.copyfile(draw.choice(others) / file.name, file)


def swap_ranks(folder: Path, draw: random.Random) -> None:
    """Two ranks' files."""
    one, other = draw.sample(sorted(folder.glob("rank-*")), 2)
    aside = folder / "aside"
    for source, target in ((one, aside), (other, one), (aside, other)):
        source.rename(target)


def empty_a_file(folder: Path, draw: random.Random) -> None:
    """Some file has no bytes any more."""
    _any_file(folder, draw).write_bytes(b"")


DAMAGES: list[Callable[[Path, random.Random], None]] = [
    truncate,
    flip_a_bit,
    remove_a_file,
    take_from_another_step,
    swap_ranks,
    empty_a_file,
]


# ---- death inside a file operation -------------------------------------------------------------------------------

_AUDITED = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree")
_CALLS = ("fsync", "pwrite", "ftruncate", "close")


def die_at(number: int, below: Path) -> None:
    """From now on this process counts its file operations below a folder and, at one of them, kills itself.

    Opening, renaming and removing are seen before they happen, by name; writing and syncing by their calls, where
    every other death is inside: half is written, or it is done and nobody learned of it.
    """
    done = 0

    def count() -> bool:
        nonlocal done
        done += 1
        return done == number

    def seen(event: str, arguments: tuple[object, ...]) -> None:
        if event in _AUDITED and str(arguments[0]).startswith(str(below)) and count():
            os.kill(os.getpid(), signal.SIGKILL)

    def watched(call: str) -> Callable[..., object]:
        original = getattr(os, call)

        def instead(file: int, *arguments: object) -> object:
            ends = count()
            if ends and call == "pwrite" and number % 2:
                data, place = arguments
                original(file, data[: len(data) // 2], place)  # type: ignore[index]
            elif ends and number % 2:
                original(file, *arguments)
            if ends:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(file, *arguments)

        return instead

    sys.addaudithook(seen)
    for call in _CALLS:
        setattr(os, call, watched(call))


def killed_at(number: int, below: Path, work: Callable[[], None]) -> bool:
    """Do work in a child that dies at its n-th file operation below a folder; whether it had so many."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            die_at(number, below)
            work()
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "the work failed by itself"
    return os.WIFSIGNALED(status)
