"""One process without a launcher: everything works uninitialised, and as a group of one (two ranks: test_launcher)."""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import timedelta

import pytest
import torch
from processes import ROOT

from recyclable import distributed
from recyclable.errors import InputError


def test_everything_works_in_a_process_that_was_never_initialised():
    assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)
    tensor = torch.tensor([1.5])
    assert distributed.sum_over_ranks(tensor) is tensor and tensor.item() == 1.5
    assert distributed.broadcast_object("value") == "value"
    distributed.barrier()
    with pytest.raises(KeyError), distributed.main_first():
        raise KeyError("own error")
    distributed.shutdown()


@pytest.mark.parametrize(("backend", "named"), [("nccl", [3]), ("gloo", None)])
def test_a_barrier_names_the_gpu_of_its_rank_to_nccl_and_none_to_gloo(
    monkeypatch: pytest.MonkeyPatch, backend: str, named: list[int] | None
) -> None:
    waited = []
    monkeypatch.setattr(distributed, "world_size", lambda: 4)
    monkeypatch.setattr(torch.distributed, "get_backend", lambda: backend)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.distributed, "barrier", lambda **options: waited.append(options))
    distributed.barrier()
    assert waited == [{"device_ids": named}]


class Store(dict[str, bytes]):
    """The store of ranks that come one after the other: nothing comes that is not there yet."""

    def set(self, key: str, value: str) -> None:
        self[key] = value.encode()

    def wait(self, keys: list[str], patience: timedelta) -> None:
        assert keys[0] in self, f"would wait for {keys[0]} until rank 0 is gone"


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (InputError("task.yaml", "is wrong"), InputError, "^task.yaml: is wrong$"),
        (ValueError("broken\nover two lines"), RuntimeError, "^rank 0 failed: ValueError: broken\nover two lines$"),
    ],
    ids=["bad input", "any other"],
)
def test_every_rank_of_every_host_hears_of_an_error_of_rank_0(
    monkeypatch: pytest.MonkeyPatch, error: Exception, kind: type[Exception], message: str
) -> None:
    monkeypatch.setattr(distributed, "world_size", lambda: 4)
    store = Store()
    monkeypatch.setattr(torch.distributed.distributed_c10d, "_get_default_store", lambda: store)
    for rank, first in enumerate((0, 0, 2, 2)):  # two hosts, of two ranks each
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(distributed, "_turns", 0)
        expected = (type(error), str(error)) if rank == 0 else (kind, message)
        with pytest.raises(expected[0], match=expected[1]), distributed.main_first(first):
            assert rank in (0, 2), "the first of its host had failed"
            if rank == 0:
                raise error


def test_a_host_whose_first_rank_fails_alone_says_so_and_rank_0_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "world_size", lambda: 4)
    store, told = Store(), []
    monkeypatch.setattr(torch.distributed.distributed_c10d, "_get_default_store", lambda: store)
    for rank, first in ((2, 2), (3, 2), (0, 0), (1, 0)):  # the second host is faster
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(distributed, "_turns", 0)
        try:
            with distributed.main_first(first):
                if rank == 2:
                    raise InputError("corpus", "is damaged there")
            told.append("")
        except InputError as error:
            told.append(str(error))
    assert told == ["corpus: is damaged there"] * 2 + [""] * 2


def test_a_rank_is_told_whether_others_wait_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with distributed.main_first() as leads:
        assert leads, "one process alone is the first"
    monkeypatch.setattr(distributed, "world_size", lambda: 4)
    store, told = Store(), []
    monkeypatch.setattr(torch.distributed.distributed_c10d, "_get_default_store", lambda: store)
    for rank, first in enumerate((0, 0, 2, 2)):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(distributed, "_turns", 0)
        with distributed.main_first(first) as leads:
            told.append(leads)
    assert told == [True, False, True, False]


def test_a_process_of_its_own_starts_ends_and_starts_again_in_silence():
    script = """
import torch
from recyclable import distributed as d
for _ in range(2):
    d.init()
    assert torch.distributed.is_initialized() and (d.rank(), d.world_size()) == (0, 1)
    assert d.sum_over_ranks(torch.ones(1)).item() == 1
    assert torch.ops.deepspeed is not None and not hasattr(torch.ops.deepspeed, "inference_all_reduce_")
    d.shutdown()
    assert not torch.distributed.is_initialized()
"""
    hidden = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "RECYCLABLE_VERBOSE")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
