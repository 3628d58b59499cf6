"""Finds the newest whole checkpoint; broken ones are named and passed over."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from recyclable import distributed
from recyclable.errors import InputError
from recyclable.launching import guard
from recyclable.training import best
from recyclable.training.checkpoint.rank_file import RankFiles
from recyclable.training.checkpoint.record import RankFile, Record, read_record
from recyclable.weights.digest import in_threads
from recyclable.weights.hashes import blake3_file

FOLDER = "checkpoints"
"""Beside a run's other files."""


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint, opened."""

    folder: Path
    record: Record
    files: RankFiles


def written(out: Path) -> list[Path]:
    """The directories of a run's checkpoints, newest first, whatever has become of them."""
    found = (out / FOLDER).glob("step-*") if (out / FOLDER).is_dir() else ()
    return sorted((path for path in found if re.fullmatch(r"step-\d{8,}", path.name)), key=step_of, reverse=True)


def newest_whole(out: Path, layout: Mapping[str, list[int]]) -> Checkpoint | None:
    """The last whole checkpoint of a run, None where none was ever written; a collective.

    Args:
        layout: name -> full shape of every parameter that this run trains.

    Raises InputError where there were some and all are broken: that run is not silently begun anew.
    """
    folders = written(out)
    problems = []
    for folder in folders:
        try:
            return _whole(folder, out, layout)
        except InputError as error:
            problems.append(str(error))
            distributed.say(f"notice: checkpoint {folder.name} is broken and passed over: {error}")
    if problems:
        problem = f"none of its {len(problems)} checkpoints is whole ({problems[0]}); start anew in another directory"
        raise InputError(out, problem)
    return None


def to_go_on_from(out: Path, layout: Mapping[str, list[int]], reads: Mapping[str, str]) -> Checkpoint | None:
    """As `newest_whole`; InputError where this run reads other content than the one in `out` did. A collective."""
    found = newest_whole(out, layout)
    if found is None:
        return None
    for name, digest in found.record.reads.items():
        if reads.get(name, digest) != digest:
            problem = f"is not what the run in {out} began with: digest {reads[name][:12]}, was {digest[:12]}"
            raise InputError(name, f"{problem}; undo the change, or start anew in another directory")
    guard.tell(checkpoint=found.record.progress.step)
    return found


def known_micro_batch(out: Path) -> int | None:
    """The micro-batch of the newest checkpoint that says one, None where none does; a collective."""
    found = None
    for folder in written(out) if distributed.is_main() else ():
        with suppress(InputError):  # broken: it is named and passed over later
            found = read_record(folder).micro_batch
            break
    return distributed.broadcast_object(found)


def step_of(folder: Path) -> int:
    """The step that a checkpoint's directory is named after."""
    return int(folder.name.removeprefix("step-"))


def _whole(folder: Path, out: Path, layout: Mapping[str, list[int]]) -> Checkpoint:
    """The checkpoint; InputError, the same on every rank, when any file of it is not as it was written."""

    def own_record() -> Record:
        record = read_record(folder)
        if record.layout != layout:
            other = sorted(name for name in {*record.layout, *layout} if record.layout.get(name) != layout.get(name))
            problem = f"is of other parameters than this run trains: {other[0]!r} and {len(other) - 1} more differ"
            raise InputError(folder, problem)
        return record

    record = distributed.agreed(own_record)
    names = sorted(record.files)
    changed = in_threads(lambda name: _problem(folder / name, record.files[name]), names, team=distributed.Ranks())
    if found := next(filter(None, changed), None):
        raise InputError(*found)
    files = distributed.agreed(lambda: RankFiles([folder / name for name in names], record.layout))
    if record.progress.best_step >= 0:  # else none are kept before the last step
        best.verified(best.tensors_file(out, record.progress.best_step), record.progress.best_digest)
    return Checkpoint(folder, record, files)


def _problem(path: Path, recorded: RankFile) -> tuple[str, str] | None:
    """Where and what is wrong with a file, if anything."""
    try:
        if (size := path.stat().st_size) != recorded.bytes:
            return str(path), f"has {size} bytes, was written with {recorded.bytes}"
        if blake3_file(path) != recorded.blake3:
            return str(path), "was changed after it was written (BLAKE3 differs)"
    except OSError as error:
        return str(path), f"cannot be read ({error.strerror}), but the checkpoint's record has it"
    return None
