"""Files and directories that are whole or absent: written aside, synced, renamed."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import secrets
import shutil
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from recyclable.errors import InputError, RunError

_OF_DISKS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE, errno.ENODEV, errno.ENOTCONN)


def sync(path: Path) -> None:
    """Flush a file or directory entry to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def disk_failures(where: object) -> Iterator[None]:
    """RunError for what a disk says that is full, read-only, broken or gone; other errors of the system stay.

    Args:
        where: what is named where the system names no file.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _OF_DISKS:
            raise
        place = error.filename if error.filename2 is None else error.filename2  # of two, what was to be written
        raise RunError(place or where, f"cannot be used any more ({error.strerror})") from error


def write_json(path: Path, value: Any, finite: bool = True) -> None:
    """Write JSON so that a reader sees the old file or the new one, never half of it.

    Args:
        finite: raise RunError for NaN and infinity, which are no JSON; False for what only this program reads.
    """
    if finite and (place := _not_finite(value)):
        raise RunError(path, f"is not written: {place}, expected a finite number")
    write_text(path, json.dumps(value, indent=1, sort_keys=True, default=str) + "\n")


def _not_finite(value: Any, place: str = "") -> str | None:
    """The first number that is not finite, and where it stands."""
    if isinstance(value, float) and not math.isfinite(value):
        return f"{place} is {value}"
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    found = (_not_finite(each, f"{place}.{name}" if place else str(name)) for name, each in inner)
    return next(filter(None, found), None)


def write_text(path: Path, text: str) -> None:
    """Write a text as `write_json` does; OSError, which names the file, leaves nothing beside it.

    The file is then the old one, or the new one where no more than its directory could not be synced.
    """
    aside = path.with_name(f".{path.name}.partial")
    try:
        aside.write_text(text, encoding="utf-8")
        sync(aside)
        aside.replace(path)
        sync(path.parent)
    except OSError as error:
        with suppress(OSError):
            aside.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error


def copy_files(source: Path, target: Path, names: Iterable[str]) -> None:
    """Copy files from one directory to another, by names that may lie one deeper."""
    for name in names:
        (target / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(source / name, target / name)


def missing_directories(folder: Path) -> list[Path]:
    """The directories that making this one makes, itself first."""
    return [path for path in (folder, *folder.parents) if not path.exists()]


def remove_empty(folders: Iterable[Path]) -> None:
    """Remove directories, inner ones first; those that were never made or that somebody else has begun to use stay."""
    for path in folders:
        with suppress(OSError, ValueError):
            path.rmdir()


@contextmanager
def new_directory(folder: Path) -> Iterator[Path]:
    """A directory aside to fill; synced, it becomes `folder` at the end, or is removed when the body fails.

    Raises FileExistsError when `folder` exists and is not empty; of several who make it at once, the first wins.
    InputError where no directory can be made there.
    """
    try:
        if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
            raise FileExistsError(folder)
        made = missing_directories(folder.parent)
        aside = folder.with_name(f".{folder.name}.partial-{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}")
        aside.mkdir(parents=True)
    except FileExistsError:
        raise
    except (OSError, ValueError) as error:  # ValueError: of a path with a null byte
        problem = f"cannot be written ({getattr(error, 'strerror', None) or error}), expected a directory or none yet"
        raise InputError(folder.parent, problem) from error
    try:
        yield aside
        for path in [*aside.rglob("*"), aside]:
            sync(path)
        try:
            aside.rename(folder)  # replaces an empty directory
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise FileExistsError(folder) from error
            raise
        sync(folder.parent)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        remove_empty(made)
        raise


def clear_leftovers(parent: Path) -> None:
    """Remove what writers of `new_directory` left aside in a directory when they died on this host."""
    for aside in parent.glob(".*.partial-*"):
        writer = re.fullmatch(rf"\..*\.partial-{re.escape(socket.gethostname())}-(\d+)-[0-9a-f]+", aside.name)
        if writer and not _alive(int(writer[1])):
            shutil.rmtree(aside, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True
