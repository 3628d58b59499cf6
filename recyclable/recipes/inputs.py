"""The files that a run reads, by the setting that names them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from recyclable.config.settings import CorpusSettings
from recyclable.data.corpus import files_of_corpus
from recyclable.tasks.parts.files import files_of_task
from recyclable.weights.locate import files_of_model, locate
from recyclable.weights.store import find

_BASES = ("base", "old_base", "second_base", "path", "parent", "teacher")
_WEIGHTS = ("weights", "second_weights", "project_from", "to")
_NO_BASES = ("cached", "online")
"""What `teacher` says in recycling."""


def inputs(settings: BaseModel | Mapping[str, Any]) -> dict[str, list[Path]]:
    """Setting, as messages call it -> files on this host; nothing of what is fetched from the hub by `datasets`.

    Raises InputError for what is not there.
    """
    found: dict[str, list[Path]] = {}
    told = settings if isinstance(settings, Mapping) else dict(settings)
    for field, files in _inputs(told, "", told.get("store")):
        found.setdefault(field, []).extend(files)
    return {field: files for field, files in found.items() if files}


def _inputs(value: Any, field: str, store: str | None) -> Iterator[tuple[str, list[Path]]]:
    name = field.rpartition(".")[2]
    if isinstance(value, CorpusSettings):
        yield f"{field}.train", files_of_corpus(value.train)
        if value.heldout is not None:
            yield f"{field}.heldout", files_of_corpus(value.heldout, "heldout")
    elif name == "task" and value is not None:
        yield field, files_of_task(value)
    elif name == "tasks" and isinstance(value, Mapping):
        yield field, [file for each in value.values() for file in files_of_task(each)]
    elif isinstance(value, BaseModel | Mapping):
        for key, each in dict(value).items():
            yield from _inputs(each, f"{field}.{key}".lstrip("."), store)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _inputs(each, field, store)
    elif isinstance(value, str | Path) and name in _WEIGHTS:
        yield field, files_of_model(find(value, store))
    elif name == "parent" and not Path(str(value)).is_dir():
        return  # another base of the study
    elif isinstance(value, str) and name in _BASES and value not in _NO_BASES:
        yield field, files_of_model(locate(value))
