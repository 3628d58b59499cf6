"""For all tests: one thread, and `datasets` caches in a folder of its own, also in processes that tests start.

Several threads only wait for each other on models so small, and sums would differ by how many there are. Without a GPU
Triton's kernels run in its interpreter, which must be chosen before anything imports Triton. No progress bars. Ctrl-C
is heeded as in a terminal, where what starts the tests in the background has it ignored.
"""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before anything imports PyTorch

import hypothesis
import pytest
import torch
from this_process import own_environment

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import datasets

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

hypothesis.settings.register_profile("untimed", deadline=None)  # a busy machine is no failure
hypothesis.settings.load_profile("untimed")


def pytest_collection_finish() -> None:
    """What was imported stays: it is not looked through whenever an engine ends and its garbage is collected."""
    gc.freeze()


def pytest_sessionfinish() -> None:
    """Else Triton's bindings call it leaked."""
    gc.unfreeze()


@pytest.fixture(scope="session", autouse=True)
def datasets_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test reads what an earlier run of the tests left behind."""
    with pytest.MonkeyPatch.context() as patch:
        folder = str(tmp_path_factory.mktemp("datasets"))
        patch.setenv("HF_DATASETS_CACHE", folder)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
        patch.setenv("RECYCLABLE_CACHE", folder)
        yield


@pytest.fixture(scope="module", autouse=True)
def module_environment() -> Iterator[None]:
    """As `environment`, around what a file of tests prepares for all of them."""
    with own_environment():
        yield


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """No test finds the process group described that another one ran alone in, nor do the processes that it starts."""
    with own_environment():
        yield


@pytest.fixture
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test that reads files sees what another one cached."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    return folder


@pytest.fixture
def real_data() -> Path:
    """The folder with tasks/ and corpora/ that RECYCLABLE_DATA names; the test is skipped without it."""
    if not os.environ.get("RECYCLABLE_DATA"):
        pytest.skip("RECYCLABLE_DATA is not set")
    return Path(os.environ["RECYCLABLE_DATA"])
