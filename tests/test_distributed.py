"""One process without a launcher: everything works uninitialised, and as a group of one (two ranks: test_launcher)."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from processes import ROOT

from recyclable import distributed


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
