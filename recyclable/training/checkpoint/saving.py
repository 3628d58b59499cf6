"""Writes checkpoints while training goes on: aside, synced, marked as whole, renamed; then older ones are dropped."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from socket import gethostname
from types import TracebackType

from recyclable import distributed
from recyclable.errors import InputError, RunError
from recyclable.launching import guard, preemption
from recyclable.training import best
from recyclable.training.checkpoint.choosing import FOLDER, step_of, written
from recyclable.training.checkpoint.rank_file import write_pieces
from recyclable.training.checkpoint.record import Progress, RankFile, Record, rank_file, read_record, write_record
from recyclable.training.pieces import Piece
from recyclable.weights.durable import sync

_PATIENCE_S = 30 * 60.0  # for the slowest rank's disk
_LAST_WORDS_S = 20.0  # for a checkpoint under way when the run fails
_LEFT = (".partial-step-*", ".dropped-step-*")


class Saver:
    """Checkpoints of a run, written by a thread of each rank: training waits for the copy into host memory alone.

    The threads use none of training's collectives. A second checkpoint waits for the first. What goes wrong in one of
    them ends the run on every rank at its next step. Making one is a collective; within, only one is in use in `out`.

    Args:
        every: steps between checkpoints; 0 writes none.
        minutes: between checkpoints, besides; None: by steps alone.
        keep: how many checkpoints stay.
        clock: seconds from any fixed moment on.
    """

    def __init__(
        self,
        out: Path,
        every: int,
        minutes: float | None = None,
        keep: int = 2,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._out, self._folder, self._every, self._minutes, self._keep = out, out / FOLDER, every, minutes, keep
        self._clock, self._last = clock, clock()
        self._board = distributed.Board()
        self._token = distributed.broadcast_object(secrets.token_hex(4))  # what an earlier run left is never mixed in
        self._thread: threading.Thread | None = None
        self._problem: str | None = None
        if distributed.is_main():
            for pattern in _LEFT:
                for left in self._folder.glob(pattern):
                    shutil.rmtree(left, ignore_errors=True)

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None:
            self.wait()
        elif self._thread is not None:
            self._thread.join(_LAST_WORDS_S)

    def due(self, step: int) -> bool:
        """Whether a checkpoint is to be written after a step, the same on all ranks; a collective with `minutes`."""
        by_step = bool(self._every) and step % self._every == 0
        if self._minutes is None:
            return by_step
        return distributed.broadcast_object(by_step or self._clock() - self._last >= 60 * self._minutes)

    def save(self, record: Record, pieces: list[Piece]) -> None:
        """Begin to write a checkpoint; waits for the one before.

        Args:
            record: without `files`; nobody changes it any more.
            pieces: what this rank keeps; they are let go of one after the other.
        """
        self.wait()
        self._last = self._clock()
        self._thread = threading.Thread(target=self._write, args=(record, pieces), name="checkpoint", daemon=True)
        self._thread.start()

    @property
    def ending(self) -> bool:
        """Whether this rank was asked to end, or knows of a checkpoint that could not be written."""
        return preemption.asked() is not None or self._problem is not None

    def after(self, step: int, end: bool, record: Callable[[], Record], pieces: Callable[[], list[Piece]]) -> None:
        """Begin to write a step's checkpoint where one is due or the run ends here, as on all ranks; a collective.

        Args:
            end: whether any rank was `ending`: then RunError of what could not be written, else Preempted.
            record, pieces: as for `save`; asked for once there is room for another copy.
        """
        if self.due(step) or end:
            self.wait()
            self.save(record(), pieces())
        if end:
            self.wait()
            raise preemption.preempted(step)

    def check(self) -> None:
        """RunError when a checkpoint could not be written."""
        if self._problem is not None:
            raise RunError(self._folder, self._problem)

    def wait(self) -> None:
        """Until the checkpoint under way is whole; RunError when it could not be written."""
        if self._thread is not None:
            self._thread.join()
        self._thread = None
        self.check()

    def _write(self, record: Record, pieces: list[Piece]) -> None:
        step = record.progress.step
        aside = self._folder / f".partial-step-{step:08d}-{self._token}"
        told: dict[str, str | int] = {"problem": ""}
        try:
            told |= self._own_file(aside, pieces)
        except BaseException as error:
            told["problem"] = f"{_told(error)} (rank {distributed.rank()} on {gethostname()})"
        try:
            self._board.post(f"{step}/{distributed.rank()}", json.dumps(told))
            if distributed.is_main():
                self._board.post(f"{step}", self._finished(record, aside))
            problem = self._board.read(f"{step}", 2 * _PATIENCE_S)
        except BaseException as error:
            problem = f"rank {distributed.rank()} on {gethostname()} heard no more of it: {_told(error)}"
        if problem:
            self._problem = f"the checkpoint of step {step} could not be written: {problem}"

    def _own_file(self, aside: Path, pieces: list[Piece]) -> dict[str, str | int]:
        self._folder.mkdir(exist_ok=True)  # a run's directory that is gone is not made anew
        aside.mkdir(exist_ok=True)
        path = aside / rank_file(distributed.rank())
        return {"blake3": write_pieces(path, pieces), "bytes": path.stat().st_size}

    def _finished(self, record: Record, aside: Path) -> str:
        """Rank 0: once all ranks have written, the checkpoint gets its record and its name; what went wrong, if any."""
        try:
            for rank in range(distributed.world_size()):
                told = json.loads(self._board.read(key := f"{record.progress.step}/{rank}", _PATIENCE_S))
                self._board.remove(key)
                if problem := told.pop("problem"):
                    shutil.rmtree(aside, ignore_errors=True)
                    return problem
                record.files[rank_file(rank)] = RankFile(**told)
            write_record(aside, record)
            final = self._folder / f"step-{record.progress.step:08d}"
            if final.exists():  # broken: the run would have gone on from it
                self._drop(final)
            os.rename(aside, final)
            sync(self._folder)
            guard.tell(checkpoint=record.progress.step)
        except TimeoutError as error:
            return f"no word of {error} for {_PATIENCE_S / 60:.0f} minutes"
        except BaseException as error:
            shutil.rmtree(aside, ignore_errors=True)
            return _told(error)
        with suppress(OSError):
            self._drop_old(record.progress)
        return ""

    def _drop_old(self, now: Progress) -> None:
        """Keep the last few checkpoints up to the one just written, and the best weights that they name."""
        found = written(self._out)
        kept = [folder for folder in found if step_of(folder) <= now.step][: self._keep]
        for folder in found:
            if folder not in kept:
                self._drop(folder)
        named = {now.best_step}
        for folder in kept:
            with suppress(InputError):  # broken, it names none
                named.add(read_record(folder).progress.best_step)
        best.drop(self._out, named, now.step)

    def _drop(self, folder: Path) -> None:
        aside = folder.with_name(f".dropped-{folder.name}-{self._token}")
        os.rename(folder, aside)  # half of it is never taken for a checkpoint
        shutil.rmtree(aside, ignore_errors=True)


def _told(error: BaseException) -> str:
    if isinstance(error, OSError):
        return f"{error.strerror or error} ({error.filename})" if error.filename else f"{error.strerror or error}"
    if isinstance(error, InputError):
        return str(error)
    return f"{type(error).__name__}: {error}"
