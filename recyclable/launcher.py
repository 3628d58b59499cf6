"""Starts a script on every rank through the deepspeed launcher, and ends the ranks with this command."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from recyclable.errors import InputError
from recyclable.host import free_port, on_cpu

_GRACE_S = 35  # deepspeed's own launcher gives ranks 30 s between asking and killing


def launch(
    script: str | Path,
    args: list[str],
    *,
    nproc: int | None = None,
    hostfile: str | Path | None = None,
    master_port: int | None = None,
) -> int:
    """Run `script args` on every rank and wait; ranks share this process's stdout and stderr.

    Args:
        nproc: ranks per host; None: the hostfile's slots, or one.
        hostfile: hosts and slots as deepspeed reads them; None: this host alone.
        master_port: None takes a free port here, or deepspeed's own with a hostfile.

    Returns 0 when all ranks succeeded, 2 when one exited with 2 (bad input), else 1; also 1 after Ctrl-C or SIGTERM.
    Raises InputError for an unusable hostfile or number of ranks.
    """
    command = _command(str(script), list(args), nproc, hostfile, master_port)
    # A session of its own: Ctrl-C reaches this process alone, which then ends the ranks in order, without tracebacks.
    # Ranks on this host also watch the pipe, so that they end with this process even when it is killed outright.
    ranks = subprocess.Popen(
        command,
        env=_environment(nproc, local=hostfile is None),
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


def end_with_command() -> None:
    """On a rank: end once the command that launched it is gone, however it died.

    Its stdin is then a pipe held open by that command alone, so it is at its end when the command is.
    """
    if os.environ.pop("RECYCLABLE_LEASH", None):
        threading.Thread(target=lambda: os.read(0, 1) or os._exit(1), daemon=True).start()


def _command(
    script: str, args: list[str], nproc: int | None, hostfile: str | Path | None, port: int | None
) -> list[str]:
    if nproc is not None and nproc < 1:
        raise InputError("--nproc", f"is {nproc}, expected at least 1 rank per host")
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--no_local_rank"]
    # "critical": at "error" deepspeed repeats the whole command line when a rank ends with a status
    command += ["--log_level", "info" if _verbose() else "critical"]
    if hostfile is None:
        command += ["--hostfile", os.devnull, "--num_gpus", str(nproc or 1)]  # else deepspeed looks for /job/hostfile
        command += ["--master_port", str(port or free_port())]
        return [*command, script, *args]
    if len(_hosts(Path(hostfile))) > 1:
        if shutil.which("pdsh") is None:
            raise InputError(hostfile, "names several hosts, but pdsh, which reaches them over ssh, is not installed")
        # deepspeed itself quotes what holds a space; everything else goes through the remote shell as it is
        args = [arg if " " in arg else shlex.quote(arg) for arg in args]
    command += ["--hostfile", str(hostfile)]
    command += ["--num_gpus", str(nproc)] if nproc else []
    command += ["--master_port", str(port)] if port else []
    return [*command, script, *args]


def _hosts(hostfile: Path) -> list[str]:
    try:
        lines = [line.strip() for line in hostfile.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(hostfile, f"cannot be read ({error}), expected lines such as `node-1 slots=8`") from error
    lines = [line for line in lines if line and not line.startswith("#")]
    for line in lines or [""]:
        if not re.match(r"\S+\s+slots=\d+", line):
            raise InputError(hostfile, f"holds {line!r}, expected lines such as `node-1 slots=8`")
    return [line.split()[0] for line in lines]


def _environment(nproc: int | None, local: bool) -> dict[str, str]:
    environment = dict(os.environ)
    if on_cpu():
        environment["DS_ACCELERATOR"] = "cpu"
    if local:
        # More threads than cores make ranks several times slower. (With a hostfile each rank sees to it itself.)
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // (nproc or 1))))
        environment["RECYCLABLE_LEASH"] = "1"
    return environment


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


def _verbose() -> bool:
    return bool(os.environ.get("RECYCLABLE_VERBOSE"))
