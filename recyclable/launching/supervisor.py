"""Starts a script on every rank through the deepspeed launcher, and ends the ranks with this command."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from recyclable.launching.checking import before_start
from recyclable.launching.command import has_others, launcher_command, launcher_environment, require_program
from recyclable.launching.hostfile import read_hostfile

_GRACE_S = 35  # deepspeed's own launcher gives ranks 30 s between asking and killing


def launch(
    script: str | Path,
    args: list[str],
    *,
    nproc: int | None = None,
    hostfile: str | Path | None = None,
    master_port: int | None = None,
    launcher: str = "pdsh",
) -> int:
    """Run `script args` on every rank and wait; ranks share this process's stdout and stderr.

    Args:
        nproc: ranks per host; None: the hostfile's slots, or one.
        hostfile: hosts and slots as deepspeed reads them; None: this host alone.
        master_port: None takes a free one, of the first host.
        launcher: what reaches other hosts, of `command.LAUNCHERS`.

    Returns 0 when all ranks succeeded, 2 when one exited with 2 (bad input), else 1; also 1 after Ctrl-C or SIGTERM.
    Raises InputError for an unusable hostfile or number of ranks.
    """
    address, meeting = None, {}
    if hostfile is not None and has_others(read_hostfile(hostfile)):
        require_program(launcher, hostfile)
        checked = before_start(hostfile, [str(script), *args], nproc)
        address, master_port = checked.address, master_port or checked.port
        meeting = {"MASTER_ADDR": str(address), "MASTER_PORT": str(master_port)} if launcher == "openmpi" else {}
    command = launcher_command(
        str(script), list(args), nproc, hostfile, master_port, launcher=launcher, address=address, extra=meeting
    )
    # A session of its own: Ctrl-C reaches this process alone, which then ends the ranks in order, without tracebacks.
    # Ranks on this host also watch the pipe, so that they end with this process even when it is killed outright.
    ranks = subprocess.Popen(
        command,
        env=launcher_environment(nproc, local=hostfile is None, extra=meeting, launcher=launcher),
        stdin=subprocess.PIPE if hostfile is None else subprocess.DEVNULL,
        start_new_session=True,
    )
    interrupted = threading.Event()
    with _handling(interrupted):
        while ranks.poll() is None and not interrupted.is_set():
            with contextlib.suppress(subprocess.TimeoutExpired):
                ranks.wait(0.2)
        if interrupted.is_set():
            _end(ranks, remote=hostfile is not None)
    if ranks.stdin:
        ranks.stdin.close()
    if ranks.returncode != 0:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(ranks.pid, signal.SIGKILL)  # whatever outlived its launcher
    if interrupted.is_set():
        return 1
    return ranks.returncode if ranks.returncode in (0, 2) else 1


@contextlib.contextmanager
def _handling(interrupted: threading.Event) -> Iterator[None]:
    """Note Ctrl-C, SIGTERM and a closed terminal instead of dying from them; only the main thread can."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    signals = [s for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(s) != signal.SIG_IGN]
    before = {s: signal.signal(s, lambda *_: interrupted.set()) for s in signals}
    try:
        yield
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


def _end(ranks: subprocess.Popen[bytes], remote: bool) -> None:
    """Ask the launcher's processes to end. Its top one forwards the request only where it has other hosts."""
    asked: set[int] = set()
    deadline = time.monotonic() + _GRACE_S
    while ranks.poll() is None and time.monotonic() < deadline:
        top = psutil.Process(ranks.pid)
        for process in ([] if remote else top.children(recursive=True)) or [top]:
            if process.pid not in asked:
                asked.add(process.pid)
                with contextlib.suppress(psutil.Error):
                    process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            ranks.wait(0.5)
    if ranks.poll() is None:
        os.killpg(ranks.pid, signal.SIGKILL)
        ranks.wait()
