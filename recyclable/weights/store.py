"""The store: a directory of adapted weights by name; no server, any number of writers and readers.

STORE/NAME/ is a directory of adapted weights (`weights.adapted`) with the manifest's own digest beside it. It is
written aside and renamed, and never changed: it is whole or absent. What begins with a dot is being written, or was.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from recyclable.errors import InputError
from recyclable.weights.durable import clear_leftovers, new_directory
from recyclable.weights.manifest import CHANGED, MANIFEST, SEAL, read_manifest, seal

_MAX_LISTED = 20
VARIABLE = "RECYCLABLE_STORE"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,99}")


class Store:
    """The entries of a directory; None is RECYCLABLE_STORE, else ./store."""

    def __init__(self, folder: str | Path | None = None) -> None:
        self.folder = Path(folder or os.environ.get(VARIABLE) or "store")

    def names(self) -> list[str]:
        """Names of all entries, sorted; a store that is not there yet has none. Files and links are no entries."""
        found = self.folder.iterdir() if self.folder.is_dir() else ()
        return sorted(e.name for e in found if _NAME.fullmatch(e.name) and e.is_dir() and not e.is_symlink())

    def listed(self) -> str:
        """The first names, for messages."""
        names = self.names()
        more = [f"{len(names) - _MAX_LISTED} more"] if len(names) > _MAX_LISTED else []
        return ", ".join([*names[:_MAX_LISTED], *more]) or "nothing"

    def path(self, name: str) -> Path:
        """Where an entry lies; InputError when there is none of that name."""
        folder = self.folder / _safe(name)
        if not folder.is_dir() or folder.is_symlink():
            raise InputError(self.folder, f"holds no {name!r}, only {self.listed()}")
        return folder

    @contextmanager
    def adding(self, name: str) -> Iterator[Path]:
        """A directory aside to fill with adapted weights; it becomes the entry `name`.

        Raises InputError when the name is taken, also by somebody who was faster.
        """
        if (self.folder / _safe(name)).exists():
            raise InputError(name, f"is in {self.folder} already; entries are never changed, choose another name")
        try:
            with new_directory(self.folder / name) as aside:
                clear_leftovers(self.folder)
                yield aside
                seal(aside)
        except FileExistsError as error:
            raise InputError(name, f"is in {self.folder} already: it was added meanwhile") from error

    def damage(self, name: str) -> list[str]:
        """What is wrong with an entry, a line per problem: any bit that is not as it was written, any file too many."""
        from recyclable.weights.adapted import AdaptedWeights  # which torch takes seconds for

        folder = self.path(name)
        try:
            wanted = {MANIFEST, SEAL, *read_manifest(folder).files}
        except InputError as error:
            return [str(error)]
        present = {entry.relative_to(folder).as_posix() for entry in folder.rglob("*")}
        present -= {Path(file).parent.as_posix() for file in wanted}
        problems = [f"{folder / file}: is missing" for file in sorted(wanted - present)]
        problems += [f"{folder / file}: does not belong to the entry" for file in sorted(present - wanted)]
        problems += [f"{folder / file}: is a link" for file in sorted(wanted) if (folder / file).is_symlink()]
        try:
            problems += [f"{folder / file}: {CHANGED}" for file in AdaptedWeights(folder, verify=False).changed()]
        except InputError as error:
            problems.append(str(error))
        return list(dict.fromkeys(problems))


def find(weights: str | Path, store: str | Path | None = None) -> Path:
    """A directory of adapted weights by its path or by its name in the store; InputError when there is neither.

    What lies under that path and is none (a task's directory, say) stands in no entry's way.

    Args:
        store: as for `Store`.
    """
    folder, opened = Path(weights), Store(store)
    if (folder / MANIFEST).is_file():
        return folder
    if _NAME.fullmatch(str(weights)) and str(weights) in opened.names():
        return opened.path(str(weights))
    if folder.is_dir():
        return folder  # who reads it says what it lacks
    problem = f"is no directory of adapted weights, nor a name in {opened.folder}, which has {opened.listed()}"
    raise InputError(weights, problem)


def _safe(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise InputError("--name", f"found {name!r}, expected letters, digits and . _ + - (100 at most, no dot first)")
    return name
