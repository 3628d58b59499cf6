"""What a test that runs commands in its own process takes back at its end: the environment, the number of threads."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def own_environment() -> Iterator[None]:
    """A run alone describes itself in the environment; the next test starts without that."""
    before = dict(os.environ)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def one_thread() -> Iterator[None]:
    """PyTorch computes with one thread, as the processes that tests start do."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
