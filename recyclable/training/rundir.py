"""The directory a run writes to: claimed before anything is trained, gone again where the run gets nowhere."""

from __future__ import annotations

import json
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from socket import gethostname
from tempfile import TemporaryFile

from pydantic import ValidationError

from recyclable import distributed
from recyclable.config.settings import Settings
from recyclable.errors import InputError
from recyclable.launching import preemption
from recyclable.training.lock import FILE as LOCK
from recyclable.training.lock import locked, patience
from recyclable.weights.durable import missing_directories, remove_empty, write_json
from recyclable.weights.strict_json import read_json

_RUN = "run.json"
_SEEN = ".seen-"
_SCRATCH = ("best-*.safetensors", ".*.partial")
_OF_A_CLAIM = (LOCK, f"{_SEEN}*", f".{_RUN}.partial")  # all that a run leaves that dies before it has begun
_PATIENCE_S = 5
# Checkpoints, weights of a later step than 0, and batches to be looked at.
PROGRESS = (
    *("checkpoints/step-*/complete.json", "*/checkpoints/step-*/complete.json"),
    *("best-*[1-9]*.safetensors", "*/best-*[1-9]*.safetensors"),
    *("bad_steps/*.json", "*/bad_steps/*.json"),
)
# These say where and how often, and what becomes of bad steps: they may differ when a run is resumed.
_FREE = {
    *("out", "log_every", "save_every", "save_every_minutes", "save_total_limit"),
    *("eval_batch_size", "teacher_cache", "gradient_checkpointing"),
    *("bad_step", "max_bad_steps", "spike_factor"),
    *("dataloader_num_workers", "dataloader_prefetch_factor"),
}


@contextmanager
def claim(
    settings: Settings, out: Path, marker: str, resume: bool, progress: Sequence[str] = PROGRESS
) -> Iterator[bool]:
    """Have `out` for this run; gives False when the result (`marker`) is there already and resume was asked for.

    Where the body fails before a new run has made any progress, nothing stays of what the run has put there.

    Args:
        progress: patterns of files worth keeping: what a run can be resumed from, or weights that it has trained.

    Raises InputError when the directory holds another run, or something else, or is not the same one for all ranks.
    """
    with _one_line("out", out):
        is_file, made = out.exists() and not out.is_dir(), missing_directories(out)
    if is_file:
        raise InputError("out", f"{out} is a file, expected a directory")
    begun = _require_own(settings, out, resume)
    distributed.barrier()
    if (out / marker).is_file():
        clear_scratch(out)  # a run may have died between the two
        if distributed.is_main():
            with suppress(InputError, OSError), locked(out):
                pass  # so its lock goes as well
        yield False
        return
    require_writable("out", out)
    with ExitStack() as held:
        with distributed.main_first(), _one_line("out", out):
            if distributed.is_main():
                out.mkdir(parents=True, exist_ok=True)
                held.enter_context(locked(out, patience()))
                begun = _require_own(settings, out, resume)  # nobody else comes in any more
        try:
            _require_shared(out)
            _by_main(out, lambda: write_json(out / _RUN, json.loads(settings.model_dump_json())))
            yield True
        except BaseException:
            # on whichever rank fails: the launcher ends the others, rank 0 perhaps before it gets here
            if not begun and not any(any(out.glob(pattern)) for pattern in (marker, *progress)):
                _empty(out)
                remove_empty(made)
            raise
        finally:
            preemption.let_go()


def _by_main(out: Path, work: Callable[[], None]) -> None:
    """Have rank 0 do it; what the system says against it is an InputError on every rank. A collective."""

    def attempt() -> None:
        if distributed.is_main():
            with _one_line("out", out):
                work()

    distributed.agreed(attempt)


def _empty(out: Path) -> None:
    """Remove all that is in a run's directory; who dies meanwhile leaves a run that may be resumed, or nothing."""
    found = list(out.iterdir()) if out.is_dir() else []
    for path in sorted(found, key=lambda path: path.name == _RUN):  # it goes last
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with suppress(OSError):
                path.unlink(missing_ok=True)


def _require_own(settings: Settings, out: Path, resume: bool) -> bool:
    """Whether this run was begun in a directory before; InputError where it holds another run, or something else."""
    with _one_line("out", out):
        begun = (out / _RUN).is_file()
        filled = out.is_dir() and any(not any(map(path.match, _OF_A_CLAIM)) for path in out.iterdir())
    if filled and not begun:
        raise InputError("out", f"{out} is not empty and holds no run of recyclable")
    if not begun:
        return False
    if not resume:
        raise InputError("out", f"{out} holds a run already; resume it with --resume, or name another directory")
    found = read_json(out / _RUN)
    if not found:
        raise InputError(out / _RUN, "is empty, expected the settings of the run; it cannot be resumed")
    wanted = json.loads(settings.model_dump_json())
    with suppress(ValidationError):  # a setting that came after the run was started has its default
        found = json.loads(type(settings).model_validate(found).model_dump_json())
    for key in sorted((wanted.keys() | found.keys()) - _FREE):
        if wanted.get(key) != found.get(key):
            raise InputError(key, f"is {wanted.get(key)!r}, but {out} was started with {found.get(key)!r}")
    return True


def require_writable(field: str, folder: Path) -> None:
    """InputError on every rank unless rank 0 can make the directory and write to it; nothing stays. A collective."""
    with distributed.main_first(), _one_line(field, folder):
        if not distributed.is_main():
            return
        made = missing_directories(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            TemporaryFile(dir=folder, prefix=_SEEN).close()  # by name only where a file system wants it
        finally:
            remove_empty(made)


@contextmanager
def _one_line(field: str, folder: Path) -> Iterator[None]:
    """What the system says of a directory, as InputError."""
    try:
        yield
    except (OSError, ValueError) as error:  # ValueError: of a path with a null byte
        reason = getattr(error, "strerror", None) or error
        problem = f"{folder} cannot be used ({reason}), expected a directory that can be written to"
        raise InputError(field, problem) from error


def _require_shared(out: Path) -> None:
    """Make the directory on rank 0; InputError on every rank when one of them does not see what is put there."""
    ranks = distributed.Ranks()
    mark = out / f"{_SEEN}{distributed.broadcast_object(secrets.token_hex(8))}"

    def leave_mark() -> None:
        out.mkdir(parents=True, exist_ok=True)
        for left in out.glob(f"{_SEEN}*"):
            left.unlink(missing_ok=True)
        mark.touch()

    _by_main(out, leave_mark)
    places = ranks.gather("" if _appears(mark) else f"rank {ranks.rank} on {gethostname()}")
    blind = ", ".join(filter(None, places))
    _by_main(out, lambda: mark.unlink(missing_ok=True))
    if blind:
        raise InputError("out", f"{out} is not on a file system that all ranks share: not seen by {blind}")


def _appears(path: Path) -> bool:
    """Whether a file is there; network file systems may need a moment."""
    end = time.monotonic() + _PATIENCE_S
    while not path.exists():
        if time.monotonic() > end:
            return False
        time.sleep(0.2)
    return True


def clear_scratch(out: Path) -> None:
    """Remove what only an unfinished run needs; what cannot be removed stays, as the result is whole."""
    if distributed.is_main():
        shutil.rmtree(out / "checkpoints", ignore_errors=True)
        for pattern in _SCRATCH:
            for path in out.glob(pattern):
                with suppress(OSError):
                    path.unlink(missing_ok=True)
    distributed.barrier()
