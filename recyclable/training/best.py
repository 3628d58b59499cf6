"""The weights of a run's best step on disk: written by all ranks, digested, and verified before they go anywhere."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from torch import nn

from recyclable import distributed
from recyclable.errors import InputError, RunError
from recyclable.training.zero import own_pieces, trainable_shapes
from recyclable.weights.checkpoint_files import SafetensorsFile
from recyclable.weights.digest import Digested
from recyclable.weights.files import SafetensorsWriter


def tensors_file(out: Path, step: int) -> Path:
    """Where the weights of a step are kept."""
    return out / f"best-{step:08d}.safetensors"


def keep(student: nn.Module, path: Path) -> str:
    """Every rank writes what it keeps of the trainable parameters into one file; returns its digest. A collective.

    Raises RunError on every rank where a parameter is not finite.
    """
    writer = SafetensorsWriter(path, trainable_shapes(student), team=distributed.Ranks())
    for name, start, values in own_pieces(student):
        writer.write(name, values, start)
    writer.close()
    try:
        return _digest(SafetensorsFile(path))
    except InputError as error:
        raise RunError("weights", f"are damaged, so that there is no result: {error}") from error


def verified(path: Path, digest: str | None) -> SafetensorsFile:
    """The file, opened; InputError on every rank when it is not the one that was written. A collective."""
    file = distributed.agreed(lambda: SafetensorsFile(path))
    if digest != _digest(file):
        raise InputError(path, "was changed after it was written (its digest is not the recorded one)")
    return file


def result(path: Path, digest: str | None) -> SafetensorsFile:
    """As `verified`, when the run that wrote it ends: RunError."""
    try:
        return verified(path, digest)
    except InputError as error:
        raise RunError("the best weights", f"cannot be the result: {error}") from error


def drop(out: Path, kept: Collection[int], until: int) -> None:
    """Remove the weights of steps up to `until` that no checkpoint and no result refers to any more."""
    for path in out.glob("best-*.safetensors"):
        step = path.stem.removeprefix("best-")
        if step.isdecimal() and int(step) <= until and int(step) not in kept:
            with suppress(OSError):  # it is in nobody's way
                path.unlink(missing_ok=True)


def _digest(file: SafetensorsFile) -> str:
    """Digest of the file, whose hashing the ranks share out; a collective."""
    content = Digested(file)
    content.complete(team=distributed.Ranks())
    return content.file_digest()
