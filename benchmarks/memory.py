"""Anonymous memory of a process: its own pages, without the page cache and mapped files. Linux only (/proc)."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MB = 1e6
_EVERY_S = 0.002


def anonymous_bytes() -> int:
    """What this process holds now."""
    return 1024 * int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def used_bytes() -> int:
    """What is in use of it: free memory that the allocator keeps for later is given back first (glibc only)."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return anonymous_bytes()


@contextmanager
def peak() -> Iterator[list[int]]:
    """A list whose one element is, at the end, the most bytes that the process held in the body, every 2 ms."""
    most, done = [anonymous_bytes()], threading.Event()

    def watch() -> None:
        while not done.wait(_EVERY_S):
            most[0] = max(most[0], anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield most
    finally:
        done.set()
        watcher.join()
        most[0] = max(most[0], anonymous_bytes())


def in_process(work: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
    """What `work` returns in a fresh process that has the imports, and the peak in MB above what it began with."""
    context = multiprocessing.get_context("forkserver")  # the server imports once, and every process is forked from it
    with context.Pool(1) as pool:
        found = pool.apply(_watched, (work, *arguments))
        pool.close()
        pool.join()  # killed, as leaving the block would, it could not give back locks (tqdm's), and that would be told
    return found


def _watched(work: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
    begin = anonymous_bytes()
    with peak() as most:
        result = work(*arguments)
    return result, (most[0] - begin) / MB
