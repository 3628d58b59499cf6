"""Keeps a directory for one run at a time: the operating system's lock on a file in it, which ends with the process."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from socket import gethostname

from recyclable.errors import InputError

FILE = ".lock"
_HAS_NONE = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""What a file system without locks says: there a run goes unprotected."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a directory; InputError when another process holds it."""
    path = folder / FILE
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(file, 100, 0).decode(errors="replace") or "another process"
            os.close(file)
            raise InputError("out", f"{folder} is in use by {holder}: wait for its end, or end it") from error
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
