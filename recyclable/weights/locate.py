"""Where a base lies on this machine: a directory, or a model of the hub that is fetched."""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path

from recyclable.errors import InputError
from recyclable.weights.chat_template import FOLDER

_WANTED = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]

_SOME = 5
"""How many directories a message names."""


def locate(base: str | Path) -> Path:
    """The local directory of a base given by path or hub name; InputError when there is none."""
    folder = Path(base)
    if folder.is_dir():
        return folder
    if folder.is_absolute() or str(base).startswith(".") or str(base).count("/") > 1:
        raise InputError(base, "is missing, expected a model directory or a hub name")
    found = _fetched(str(base), _WANTED)
    from recyclable.weights.tokenizer_files import class_files  # with transformers: a directory needs none

    others = [name for name in sorted(class_files(found)) if not any(fnmatch(name, wanted) for wanted in _WANTED)]
    return _fetched(str(base), [*_WANTED, *others]) if others else found


def files_of_model(folder: Path) -> list[Path]:
    """The files of a directory of a base, or of adapted weights, that anything is read from."""
    from recyclable.weights.tokenizer_files import class_files

    named = class_files(folder)
    own = (path for path in folder.iterdir() if path.name in named or any(fnmatch(path.name, w) for w in _WANTED))
    return sorted(path for path in (*own, *(folder / FOLDER).glob("*.jinja")) if path.is_file())


def locate_config(base: str | Path) -> Path:
    """Where a base's config.json alone lies: its directory, or a JSON file; of a hub name nothing else is fetched.

    InputError when there is none.
    """
    place = Path(base)
    if place.is_dir() or (place.suffix == ".json" and place.is_file()):
        return place
    if place.exists() or place.is_absolute() or str(base).startswith(".") or str(base).count("/") > 1:
        raise InputError(base, "is no model: expected a directory with config.json, that file, or a hub name")
    return _fetched(str(base), ["config.json"])


def inside(folder: Path, *files: str) -> str:
    """Where any of these files lies in a directory that lacks them, at most two deeper, for a message; else nothing."""
    try:
        deeper = [path for pattern in ("*", "*/*") for path in folder.glob(pattern) if path.is_dir()]
        found = [path for path in deeper if any((path / file).is_file() for file in files)]
    except OSError:  # it may not be looked into
        return ""
    names = sorted((str(path.relative_to(folder)) for path in found), key=lambda name: (len(name), name))
    some = ", ".join(names[:_SOME]) + ", ..." * (len(names) > _SOME)
    return f"; found in it in {some}: name that directory" if names else ""


def _fetched(name: str, wanted: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=wanted))
    except Exception as error:  # the hub client raises many kinds, from its own to the HTTP library's
        raise InputError(name, f"is no directory and the hub did not give it ({type(error).__name__})") from error
