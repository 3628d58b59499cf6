"""Starts and ends the process group, and the few collectives the rest of the package needs.

Everything here also works in one process that was never initialised.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, PrefixStore

from recyclable import output
from recyclable.errors import InputError, RunError
from recyclable.host import free_port, interface_towards, use_cpu_if_alone
from recyclable.launching import guard
from recyclable.launching.mpi import describe_rank
from recyclable.weights.team import Team

T = TypeVar("T")
_turns = 0  # how often main_first ran: every rank counts alike
_boards = 0  # how many boards were made: likewise
_POLL_S = 0.02


def init() -> None:
    """Join the process group the launcher describes in the environment, or make one of a single process."""
    if dist.is_initialized():
        return
    describe_rank()
    guard.begin()
    if "RANK" not in os.environ:
        alone = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        os.environ.update({name: str(value) for name, value in alone.items()})
    use_cpu_if_alone()
    if interface := interface_towards(os.environ["MASTER_ADDR"]):
        # else gloo takes what this host's own name stands for, often 127.0.0.1, and waits for the others for ever
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    import deepspeed

    verbose = bool(os.environ.get("RECYCLABLE_VERBOSE"))
    for handler in [deepspeed.utils.logger, *deepspeed.utils.logger.handlers]:
        handler.setLevel(logging.INFO if verbose else logging.WARNING)
    if not verbose:  # DeepSpeed calls collectives by names that torch is about to change
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    # DeepSpeed would compile a shared-memory all-reduce at its first start on a CPU: a minute, and a rank killed
    # meanwhile leaves a lock that hangs every later run. Gloo gives the same sums.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    elif "OMP_NUM_THREADS" not in os.environ:  # as on hosts reached over ssh: ranks that share cores slow each other
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_SIZE", 1))))
    deepspeed.init_distributed(verbose=verbose)


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """While it lasts, this process is in a group: the one it is in already, else one that is left again at the end."""
    if dist.is_initialized():
        yield
        return
    before = dict(os.environ)
    init()
    try:
        yield
    finally:
        shutdown()
        os.environ.clear()
        os.environ.update(before)


def device() -> str:
    """Where a plain model runs on this rank: its GPU, or the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def rank() -> int:
    """This process's number among all ranks."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many ranks train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """True on the one rank that talks and writes."""
    return rank() == 0


def say(line: str) -> None:
    """Print a line for a person, once whatever the number of ranks."""
    if is_main():
        output.say(line)


def barrier() -> None:
    """Wait until every rank is here."""
    if world_size() > 1:
        # NCCL's barrier is an all-reduce on a GPU: without a name it may take one that another rank has, and hang
        dist.barrier(device_ids=[torch.cuda.current_device()] if dist.get_backend() == "nccl" else None)


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """Add a tensor up over all ranks, in place and in its own dtype; any device and layout."""
    if world_size() > 1:
        needs_gpu = dist.get_backend() == "nccl" and not tensor.is_cuda
        sent = tensor.detach().to("cuda" if needs_gpu else tensor.device).contiguous()
        dist.all_reduce(sent, op=dist.ReduceOp.SUM)
        if sent.data_ptr() != tensor.data_ptr():
            tensor.detach().copy_(sent)
    return tensor


class Coming:
    """Numbers on their way from the device: to ask for them waits for what was queued before, not for all since."""

    def __init__(self, numbers: torch.Tensor) -> None:
        self._there: torch.cuda.Event | None = None
        self._numbers = numbers.detach()
        if numbers.is_cuda:
            pinned = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self._numbers = pinned.copy_(self._numbers, non_blocking=True)
            self._there = torch.cuda.Event()
            self._there.record()

    @property
    def pending(self) -> bool:
        """Whether they may still be on their way; a CPU has them at once."""
        return self._there is not None

    def values(self) -> list[float]:
        """The numbers, in a row."""
        if self._there is not None:
            self._there.synchronize()
        return self._numbers.flatten().tolist()

    def value(self) -> float:
        """The only one."""
        return self.values()[0]


def broadcast_object(value: T) -> T:
    """Rank 0's value on every rank; what the others pass in is dropped."""
    if world_size() == 1:
        return value
    box: list[Any] = [value if is_main() else None]
    dist.broadcast_object_list(box, src=0)
    return box[0]


class Ranks(Team):
    """The ranks of this run, which read and write weights together."""

    def __init__(self) -> None:
        self.rank, self.size = rank(), world_size()

    def gather(self, value: T) -> list[T]:
        """Every rank's value, by rank; a collective."""
        if self.size == 1:
            return [value]
        values: list[T] = [value] * self.size
        dist.all_gather_object(values, value)
        return values


def agreed(work: Callable[[], T]) -> T:
    """What `work` returns here; where it fails on any rank, InputError on every rank. A collective.

    `work` has no collective of its own. What the system says of a file is an InputError, too.
    """
    return _agreed(work, InputError, "read")


def agreed_write(work: Callable[[], T]) -> T:
    """As `agreed`, of what writes while a run is under way: RunError on every rank, as where the disk is full."""
    return _agreed(work, RunError, "written")


def main_writes(work: Callable[[], object]) -> None:
    """Have rank 0 do it while the others wait; where it cannot, RunError on every rank. A collective."""
    agreed_write(lambda: work() if is_main() else None)


def tried(work: Callable[[], T], done: str) -> tuple[T | None, tuple[str, str] | None]:
    """What `work` returns, or, where it fails, what an InputError would say: where, and which problem.

    Args:
        done: what was done to the file of which the system says something, as a participle.
    """
    try:
        return work(), None
    except InputError as error:
        return None, (error.where, str(error).removeprefix(f"{error.where}: "))
    except OSError as error:
        return None, (str(error.filename or "a file"), f"cannot be {done} ({error.strerror or error})")


def _agreed(work: Callable[[], T], error_kind: type[InputError], done: str) -> T:
    value, problem = tried(work, done)
    if found := next(filter(None, Ranks().gather(problem)), None):
        raise error_kind(*found)
    return cast(T, value)


class Board:
    """Notes that ranks leave for each other in their store, without any collective: for threads beside the main one.

    Every rank makes its boards in the same order.
    """

    def __init__(self) -> None:
        global _boards
        _boards += 1
        alone = world_size() == 1
        store = HashStore() if alone else dist.distributed_c10d._get_default_store()
        self._store = PrefixStore(f"recyclable/board/{_boards}", store)

    def post(self, key: str, note: str) -> None:
        """Leave a note."""
        self._store.set(key, note)

    def read(self, key: str, patience_s: float) -> str:
        """A note, as soon as it is there; TimeoutError when it does not come."""
        end = time.monotonic() + patience_s
        while not self._store.check([key]):  # no `wait`, which would keep this process's other threads from the store
            if time.monotonic() > end:
                raise TimeoutError(key)
            time.sleep(_POLL_S)
        return self._store.get(key).decode()

    def remove(self, key: str) -> None:
        """Take a note away."""
        self._store.delete_key(key)


@contextlib.contextmanager
def main_first(first: int = 0) -> Iterator[bool]:
    """Run the body on rank 0, then on the others, who find its files there; yields whether this rank is waited for.

    Fails on every rank when it fails on rank 0: with the same InputError, or a RuntimeError naming what happened.

    Args:
        first: the rank that is waited for instead of rank 0, and runs the body at the same time: on a host whose disk
            is its own, the first there (`disks.keeper`). The body has no collective.
    """
    if world_size() == 1:
        yield True
        return
    global _turns
    _turns += 1
    # A key in the ranks' store and no collective: preparing a large corpus takes longer than a collective may wait.
    store, turn = dist.distributed_c10d._get_default_store(), f"recyclable/main_first/{_turns}"
    key = f"{turn}/{rank()}"

    def wait_for(number: int) -> str:
        """What that rank failed with, or nothing."""
        store.wait([f"{turn}/{number}"], timedelta(days=7))  # ends at once, with an error, when rank 0 is gone
        return store.get(f"{turn}/{number}").decode()

    leads = is_main() or rank() == first
    if not leads:
        if found := wait_for(first):
            raise _error_of_first(found)
        yield False
        return
    try:
        yield True
    except BaseException as error:
        where = error.where if isinstance(error, InputError) else ""
        store.set(key, f"{rank()}\n{type(error).__name__}\n{where}\n{error}")
        raise
    found = "" if is_main() else wait_for(0)
    store.set(key, found)  # for those who wait for this one
    if found:
        raise _error_of_first(found)


def shutdown() -> None:
    """Leave the process group; harmless when there is none."""
    if not dist.is_initialized():
        return
    import deepspeed.comm.comm as deepspeed_comm
    from deepspeed.utils import groups as deepspeed_groups

    dist.destroy_process_group()
    deepspeed_comm.cdb = None  # DeepSpeed keeps its own records of the group
    deepspeed_groups._WORLD_GROUP = None


def _error_of_first(found: str) -> Exception:
    number, kind, where, message = found.split("\n", 3)
    if kind == InputError.__name__:
        return InputError(where, message.removeprefix(f"{where}: "))
    return RuntimeError(f"rank {number} failed: {kind}: {message}")
