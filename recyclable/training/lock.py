"""Keeps a directory for one run at a time: the operating system's lock on a file in it, which ends with the process."""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from socket import gethostname

from recyclable.errors import InputError, RunError
from recyclable.launching.watch import RESTART

FILE = ".lock"
_HAS_NONE = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""What a file system without locks says: there a run goes unprotected."""
_POLL_S = 0.5
_LOST_HOLDER_S = 180.0


def patience() -> float:
    """Seconds that a run waits for its directory: a file server takes a while to miss the host that held it before."""
    return _LOST_HOLDER_S if RESTART in os.environ else 0


@contextmanager
def locked(folder: Path, patience_s: float = 0) -> Iterator[None]:
    """Hold a directory; InputError when another process holds it, RunError when it still does after some patience."""
    path, end = folder / FILE, time.monotonic() + patience_s
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(file, 100, 0).decode(errors="replace") or "another process"
            os.close(file)
            if time.monotonic() < end:
                time.sleep(_POLL_S)
                continue
            kind = RunError if patience_s else InputError
            raise kind("out", f"{folder} is in use by {holder}: wait for its end, or end it") from error
        except OSError as error:
            if error.errno not in _HAS_NONE:
                os.close(file)
                raise
        if _is(path, file):
            break
        os.close(file)  # who held it before took it away in between
    try:
        os.ftruncate(file, 0)
        os.pwrite(file, f"process {os.getpid()} on {gethostname()}".encode(), 0)
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(file)


def _is(path: Path, file: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file))
    except FileNotFoundError:
        return False
