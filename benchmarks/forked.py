"""Ranks forked from one process that has everything imported: a start takes a second or two, not fifteen."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from recyclable.host import free_port

IMPORTS = ["deepspeed", "recyclable.recipes.pretrain", "recyclable.recipes.tune", "recyclable.recipes.recycle"]


def start(
    work: Callable[..., Any], *arguments: Any, ranks: int, log: Path | None = None, method: str = "forkserver"
) -> list[BaseProcess]:
    """Start `work` on so many ranks, told what a launcher would tell them.

    Args:
        log: all that they print is added there.
        method: `spawn` where ranks use a GPU, which does not survive a fork.
    """
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload(IMPORTS)
    together = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": ranks, "LOCAL_SIZE": ranks}
    started = []
    for number in range(ranks):
        told = {key: str(value) for key, value in (together | {"RANK": number, "LOCAL_RANK": number}).items()}
        started.append(context.Process(target=_told, args=(work, arguments, told, log)))
        started[-1].start()
    return started


def _told(work: Callable[..., Any], arguments: tuple[Any, ...], told: dict[str, str], log: Path | None) -> None:
    os.environ.update(told)
    if log is not None:
        with log.open("ab", buffering=0) as file:
            for stream in (sys.stdout, sys.stderr):
                os.dup2(file.fileno(), stream.fileno())
    import torch

    torch.set_num_threads(1)
    work(*arguments)
