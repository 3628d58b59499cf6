"""Two trainings that take turns on one machine: each stands still between steps while the other is measured."""

from __future__ import annotations

import json
import os
import re
import socket
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
from forked import start
from training_case import Case, cores

_TIMEOUT_S = 600.0


class Gate:
    """A rank's side: it counts steps, tells what a turn took, and waits for the next. Takes its share of the cores.

    Args:
        port: where the one who measures listens, on this host.
        measure: asked for between turns; seconds.
    """

    def __init__(self, port: int, case: Case, measure: Callable[[], float] = lambda: 0.0) -> None:
        self._case, self._measure = case, measure
        self._steps, self._begun = 0, time.perf_counter()
        threads = max(1, cores() // case.ranks)
        torch.set_num_threads(threads)
        os.environ["OMP_NUM_THREADS"] = str(threads)  # as launchers say it; accelerate takes its own number without
        self._socket = socket.create_connection(("127.0.0.1", port))
        self._stream = self._socket.makefile("rw")
        self.losses: dict[int, float] = {}
        """Step, from 1 on -> loss, where this rank knows it."""

    @property
    def steps(self) -> int:
        """How many have ended."""
        return self._steps

    def step(self) -> None:
        """A step has ended; at a turn's end this process waits, and at the last one's it ends."""
        self._steps += 1
        if self._steps < self._case.warm or (self._steps - self._case.warm) % self._case.each:
            return
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._tell(seconds=time.perf_counter() - self._begun, peak_mb=peak_mb())
        while (told := self._stream.readline().strip()) == "measure":
            self._tell(seconds=self._measure())
            forget_peak()
        if told != "go":
            self._end()
        self._begun = time.perf_counter()

    def _end(self) -> NoReturn:
        self._tell(losses=self.losses)
        os._exit(0)  # no result is wanted of it

    def _tell(self, **what: Any) -> None:
        self._stream.write(json.dumps(what) + "\n")
        self._stream.flush()


def peak_mb() -> float:
    """The most that this process ever had resident; on a GPU what it had there. Linux only (/proc)."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() * 1e-6
    return 1024e-6 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def forget_peak() -> None:
    """What was measured between turns is no peak of the training's."""
    Path("/proc/self/clear_refs").write_text("5")


class Side:
    """All ranks of one training, started and brought to the end of their first steps.

    Args:
        work: what each rank does, told the case, a folder of its own and the port of its gate.
        method: how ranks are started (`multiprocessing`).
    """

    def __init__(
        self, work: Callable[[Case, Path, int], None], case: Case, folder: Path, method: str = "forkserver"
    ) -> None:
        self._log, self.peak_mb = folder / "log", 0.0
        folder.mkdir(parents=True)
        with socket.create_server(("127.0.0.1", 0)) as server:
            server.settimeout(1.0)
            told = (case, folder, server.getsockname()[1])
            self._ranks = start(work, *told, ranks=case.ranks, log=self._log, method=method)
            self._streams = [self._connected(server) for _ in self._ranks]
        self._turn_ended()

    def _connected(self, server: socket.socket) -> Any:
        give_up = time.monotonic() + _TIMEOUT_S
        while time.monotonic() < give_up and all(rank.exitcode is None for rank in self._ranks):
            try:
                connection, _ = server.accept()
            except TimeoutError:
                continue
            connection.settimeout(_TIMEOUT_S)
            return connection.makefile("rw")
        raise self._failed()

    def turn(self) -> float:
        """Seconds of the next steps, of the slowest rank."""
        self._say("go")
        return self._turn_ended()

    def measured(self) -> float:
        """Seconds of what is measured between turns, by all ranks at the same time, of the slowest."""
        self._say("measure")
        return max(told["seconds"] for told in self._hear())

    def end(self) -> dict[int, float]:
        """Step -> loss, as the first rank that knows it tells."""
        self._say("end")
        found = [told["losses"] for told in self._hear()]
        for rank in self._ranks:
            rank.join(_TIMEOUT_S)
        return {int(step): loss for step, loss in next(filter(None, found), {}).items()}

    def kill(self) -> None:
        """Whatever of it still runs."""
        for rank in self._ranks:
            rank.kill()
            rank.join()

    def _turn_ended(self) -> float:
        told = self._hear()
        self.peak_mb = max(self.peak_mb, *(one["peak_mb"] for one in told))
        return max(one["seconds"] for one in told)

    def _say(self, word: str) -> None:
        for stream in self._streams:
            stream.write(word + "\n")
            stream.flush()

    def _hear(self) -> list[dict[str, Any]]:
        lines = [stream.readline() for stream in self._streams]
        if not all(lines):
            raise self._failed()
        return [json.loads(line) for line in lines]

    def _failed(self) -> RuntimeError:
        self.kill()
        return RuntimeError(f"a rank ended before its time:\n{self._log.read_text(errors='replace')[-4000:]}")


def loss_diff(ours: dict[int, float], peers: dict[int, float]) -> float:
    """Mean absolute difference over the steps that both told."""
    both = ours.keys() & peers.keys()
    if len(both) < max(len(ours), len(peers)) - 1:
        raise RuntimeError(f"losses of steps {sorted(ours)} against {sorted(peers)}: they cannot be compared")
    return statistics.fmean(abs(ours[step] - peers[step]) for step in both)
