"""Makes the batches of a run's steps, in the loop's thread or ahead of it in worker processes.

What a step's batches are is a function of seed and step alone (`data.order`, `data.examples`): who makes them, and
when, changes nothing.
"""

from __future__ import annotations

import math
import os
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch.multiprocessing import _prctl_pr_set_pdeathsig  # type: ignore[attr-defined]
from torch.utils.data import DataLoader, Dataset

from recyclable import distributed, machine
from recyclable.config.settings import TrainSettings
from recyclable.data.blocks import MaskedBlocks
from recyclable.data.examples import WHOLE, Batch, Examples
from recyclable.data.order import Item, Steps, share_of_step
from recyclable.errors import InputError, RunError
from recyclable.launching import guard, preemption
from recyclable.objectives.objective import Objective

_ON_GPU = 2
"""Workers where the settings name none and a GPU computes, as far as there are cores: a worker makes the batches of
65,536 masked tokens in some 15 ms, fewer than a GPU takes to learn from them."""
_SHARED_MEMORY, _SHARED = "/dev/shm", 1 << 30
"""Where batches are on their way from a worker, and bytes free there without which there is none unless asked for: a
step's tokens are a few MB, a teacher's states of them may be 256, and two workers have made four steps ahead. A
container has 64 MB there if nobody says otherwise, and whoever writes more is ended."""
_AHEAD = 2
"""Steps that a worker is ahead, unless the settings say otherwise; as torch's DataLoader."""
_ALIGNED = 16
"""Bytes: tensors begin at multiples of it."""


class Fed(NamedTuple):
    """What one rank has of a step."""

    items: list[Item]
    """The examples of the whole step."""
    batches: list[Batch]
    """This rank's micro-batches, on the host."""
    counts: torch.Tensor
    """[terms + 1] (fp64): what this rank adds to what each term's sum is divided by, and its tokens."""


class _InOnePiece(NamedTuple):
    """The same on its way from a worker, where each tensor would be a handshake of half a millisecond."""

    items: list[Item]
    content: torch.Tensor
    """The bytes of all tensors."""
    places: list[dict[str, tuple[int, torch.dtype, torch.Size]]]
    """Where each begins in `content`, by its name: those of the micro-batches, then the counts."""

    @classmethod
    def of(cls, fed: Fed) -> _InOnePiece:
        """The piece."""
        places: list[dict[str, tuple[int, torch.dtype, torch.Size]]] = []
        at, every = 0, [*fed.batches, {"": fed.counts}]
        for tensors in every:
            places.append({})
            for name, tensor in tensors.items():
                places[-1][name] = at, tensor.dtype, tensor.shape
                at += -(-tensor.nbytes // _ALIGNED) * _ALIGNED
        piece = cls(fed.items, torch.empty(at, dtype=torch.uint8), places)
        for tensors, each in zip(every, places, strict=True):
            for name, tensor in tensors.items():
                piece._at(*each[name]).copy_(tensor)
        return piece

    def apart(self) -> Fed:
        """Each tensor is a view of the one piece, and pinned where that is."""
        *batches, counts = [{name: self._at(*place) for name, place in each.items()} for each in self.places]
        return Fed(self.items, batches, counts[""])

    def _at(self, begin: int, dtype: torch.dtype, shape: torch.Size) -> torch.Tensor:
        return self.content[begin : begin + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)


class StepBatches(Dataset[Fed | Exception]):
    """Step -> what one rank has of it, or why it has nothing: errors with a line of their own come out as such a line.

    Args:
        micro_batch: examples in each micro-batch of a rank.
    """

    def __init__(self, examples: Examples, order: Steps, objective: Objective, micro_batch: int) -> None:
        self._examples, self._order, self._objective = examples, order, objective
        self._share = (distributed.rank(), distributed.world_size(), micro_batch)
        # encoders alone are the faster for it, and blocks alone are always whole
        self._marks = torch.cuda.is_available() and isinstance(examples, MaskedBlocks)

    def __getitem__(self, step: int) -> Fed | Exception:
        try:
            items = self._order.step(step)
            batches = [self._examples.batch(share) for share in share_of_step(items, *self._share)]
        except (InputError, OSError) as error:  # torch would make a RuntimeError of them on their way from a worker
            return error
        counted = [self._objective.counts(batch) for batch in batches]
        counts = [sum(each[term] for each in counted) for term in self._objective.weights]
        tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
        if self._marks:
            for batch in batches:
                if batch["attention_mask"].all():
                    batch[WHOLE] = torch.empty(0, dtype=torch.long)
        return Fed(items, batches, torch.tensor([*counts, tokens], dtype=torch.float64))


class Feed:
    """Steps' batches, one step after the other.

    Attributes:
        waited: seconds that the last one took to come.
    """

    def __init__(self, steps: Iterator[Fed | _InOnePiece | Exception]) -> None:
        self._steps, self.waited = steps, 0.0

    def next(self) -> Fed:
        """The next step's; InputError, RunError or OSError where they cannot be made."""
        begin = time.perf_counter()
        try:
            fed = next(self._steps)
        except (OSError, EOFError) as error:  # of what a worker has sent that is gone
            raise _lost(error) from error
        self.waited = time.perf_counter() - begin
        if isinstance(fed, Exception):
            raise fed
        return fed.apart() if isinstance(fed, _InOnePiece) else fed


@contextmanager
def feeding(made: StepBatches, settings: TrainSettings, ds_config: dict[str, Any], first: int) -> Iterator[Feed]:
    """The batches of a run's steps from the `first` on (from 0), pinned where a GPU will want them.

    Workers see what this process had when they began: nothing that batches are made of may change afterwards. They hear
    of no signal, and are gone when this rank is.

    Raises RunError where a worker is ended from outside, as by a system that is out of memory.
    """
    workers = workers_of(settings, ds_config)
    loader = DataLoader(
        made,
        batch_size=None,
        sampler=range(first, settings.max_steps),
        collate_fn=_one_piece if workers else _as_made,  # torch's own would make lists of tuples
        num_workers=workers,
        prefetch_factor=(settings.dataloader_prefetch_factor or _AHEAD) if workers else None,
        multiprocessing_context="fork" if workers else None,
        worker_init_fn=partial(_begin_worker, os.getpid()),
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # else it draws from the one that dropout is drawn from
    )
    # tokenizers' threads are not there in a worker, of which it would tell a person; nothing is tokenised any more
    threads = {"TOKENIZERS_PARALLELISM": os.environ.get("TOKENIZERS_PARALLELISM", "false")}
    with preemption.unheard(), patch.dict(os.environ, threads):
        steps = iter(loader)
    try:
        try:
            yield Feed(steps)
        finally:
            if workers:
                _end(steps)  # now: a traceback may hold on to it
    except RuntimeError as error:  # which a signal raises, wherever this process is
        if not str(error).startswith("DataLoader worker"):
            raise
        raise _lost(error) from error


def workers_of(settings: TrainSettings, ds_config: dict[str, Any]) -> int:
    """How many processes make batches for this rank."""
    if settings.dataloader_num_workers is not None:
        return settings.dataloader_num_workers
    if not torch.cuda.is_available():
        return 0
    if machine.homes(ds_config) != ("none", "none"):
        return 0  # what the host keeps for the model would be there twice: steps write to pages that workers share
    if _free_shared_memory() < _SHARED:
        return 0
    cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_SIZE", 1))
    return max(0, min(_ON_GPU, cores - 1))


def _free_shared_memory() -> int:
    """Bytes; 0 where there is none."""
    try:
        return shutil.disk_usage(_SHARED_MEMORY).free
    except OSError:
        return 0


def _end(steps: Any) -> None:
    """End the workers of a DataLoader's iterator, those as well that SIGTERM, by which torch would, does not reach."""
    try:
        steps._shutdown_workers()
    finally:
        for worker in steps._workers:
            worker.kill()
            worker.join()


def _lost(error: Exception) -> RunError:
    problem = f"a worker that makes batches is gone: {str(error).rstrip('. ')}"
    return RunError("dataloader_num_workers", f"{problem}: dataloader_num_workers: 0 goes without workers")


def _as_made(fed: Any) -> Any:
    return fed


def _one_piece(fed: Any) -> Any:
    return _InOnePiece.of(fed) if isinstance(fed, Fed) else fed


def _begin_worker(rank: int, _: int) -> None:
    """In a worker: end with the rank, whatever ends that.

    Args:
        rank: its process.
    """
    _prctl_pr_set_pdeathsig(signal.SIGKILL)
    if os.getppid() != rank:
        os._exit(1)
    guard.leave()
