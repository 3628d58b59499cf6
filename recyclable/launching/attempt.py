"""One start of a script on every rank through the deepspeed launcher, watched over until all of them have ended."""

from __future__ import annotations

import contextlib
import os
import secrets
import selectors
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from recyclable.launching import causes
from recyclable.launching.causes import Cause
from recyclable.launching.checking import before_start
from recyclable.launching.command import has_others, launcher_command, launcher_environment, require_program
from recyclable.launching.hostfile import read_hostfile
from recyclable.launching.hub import Hub
from recyclable.launching.watch import HERE, RESTART, VARIABLE, Watch, own_addresses

_TICK_S = 0.2
_LAST_S = 3.0  # for what ranks still tell of the launcher's end, and for the launcher to notice theirs
_DONE_S = 60.0  # the same where all is done: processes of large models take a while to end
_STOPPED_S = 10.0  # then a rank that is stopped before it has begun is given up


@dataclass(frozen=True)
class Attempt:
    """What became of one start of all ranks."""

    status: int
    culprits: set[int]
    """Ranks that were killed, stopped or lost: not those that ended because of them."""
    lost: bool
    """Whether some of them may still run, on a host that is out of reach."""
    asked: bool
    """Whether a person or the system asked for the end."""
    lasting: bool = False
    """Whether it would come to the same again."""


def attempt(
    script: str | Path,
    args: list[str],
    *,
    nproc: int | None = None,
    hostfile: str | Path | None = None,
    master_port: int | None = None,
    launcher: str = "pdsh",
    resumes: bool = False,
    again: bool = False,
) -> Attempt:
    """As `supervisor.launch`, once.

    Args:
        again: whether it was tried before.
    """
    hosts = {} if hostfile is None else read_hostfile(hostfile)
    address, extra = None, {RESTART: "1"} if again else {}
    if hostfile is not None and has_others(hosts):
        require_program(launcher, hostfile)
        checked = before_start(hostfile, [str(script), *args], nproc)
        address, master_port = checked.address, master_port or checked.port
        if launcher == "openmpi":
            extra |= {"MASTER_ADDR": str(address), "MASTER_PORT": str(master_port)}
    local, token = hostfile is None, secrets.token_hex(16)
    places = [host for host, slots in hosts.items() for _ in range(nproc or slots)]
    with selectors.DefaultSelector() as selector, Hub(selector, HERE if local else "", 0, token, places=places) as hub:
        extra[VARIABLE] = str(Watch((HERE,) if local else own_addresses(hosts), hub.port, token))
        command = launcher_command(
            str(script), list(args), nproc, hostfile, master_port, launcher=launcher, address=address, extra=extra
        )
        # A session of its own: Ctrl-C reaches this process alone, which then ends the ranks in order.
        started = subprocess.Popen(
            command,
            env=launcher_environment(nproc, local, extra, launcher),
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            status, asked = _supervise(hub, selector, started, resumes)
        finally:
            _end(started)
        lasting = hub.ending is not None and hub.ending.lasting
        return Attempt(status, hub.culprits(), hub.any_lost(), asked, lasting)


def _supervise(
    hub: Hub, selector: selectors.BaseSelector, launcher: subprocess.Popen[bytes], resumes: bool
) -> tuple[int, bool]:
    """Until it is over; how it ended, and whether it was asked to."""
    stopped, ended_at = _Stopped(launcher.pid), None
    with _noted() as asked:
        obeyed = 0
        while not hub.over:
            for key, _ in selector.select(_TICK_S):
                key.data()
            if len(asked) > obeyed:
                _obey(hub, asked, resumes)
                obeyed = len(asked)
            if launcher.poll() is not None:
                ended_at = ended_at or time.monotonic()
                if time.monotonic() > ended_at + _LAST_S:
                    hub.launcher_ended(_how(launcher.returncode))
            elif not hub.heard_of_all and stopped.for_long():
                hub.blame(Cause(None, "a rank was stopped (SIGSTOP or the like) before it had begun"))
            hub.tick()
        assert hub.ending is not None
        status = hub.ending.status
        with contextlib.suppress(subprocess.TimeoutExpired):
            launcher.wait(_DONE_S if status == causes.DONE else _LAST_S)
        return status, bool(asked)


def _obey(hub: Hub, asked: list[int], resumes: bool) -> None:
    if asked.count(signal.SIGINT) > 1:
        hub.interrupt()
    else:
        # Ctrl-C would end a rank that cannot be gone on with in a traceback
        hub.preempt(signal.SIGTERM if asked[-1] == signal.SIGINT else asked[-1], resumes)


def _how(status: int) -> str:
    """How a process ended, by what `Popen` says of it; the launcher hands a signal on as 256 less its number."""
    number = -status if status < 0 else 256 - status if status > 256 - signal.NSIG else 0
    if number in set(signal.Signals):
        return f"ended by signal {number} ({signal.Signals(number).name})"
    return f"ended with status {status}"


class _Stopped:
    """Looks for processes below one that somebody has stopped: what nobody else sees of ranks that have not begun."""

    def __init__(self, pid: int) -> None:
        self._top = psutil.Process(pid)
        self._looked = time.monotonic()
        self._since: float | None = None

    def for_long(self) -> bool:
        """Whether one has been for long; looks every second."""
        now = time.monotonic()
        if now > self._looked + 1:
            self._looked = now
            found = False
            with contextlib.suppress(psutil.Error):
                found = any(p.status() == psutil.STATUS_STOPPED for p in [self._top, *self._top.children(True)])
            self._since = (self._since or now) if found else None
        return self._since is not None and now > self._since + _STOPPED_S


@contextlib.contextmanager
def _noted() -> Iterator[list[int]]:
    """Note signals that ask for an end instead of dying from them; only the main thread can."""
    asked: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    wanted = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
    signals = [s for s in wanted if signal.getsignal(s) != signal.SIG_IGN]
    before = {s: signal.signal(s, lambda number, _: asked.append(number)) for s in signals}
    try:
        yield asked
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


def _end(launcher: subprocess.Popen[bytes]) -> None:
    """Whatever outlived its ranks, or ranks that have no guardian yet."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(launcher.pid, signal.SIGKILL)
    launcher.wait()
