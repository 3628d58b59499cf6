"""From a YAML run config and key=value to checked settings: one clear line per mistake."""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from recyclable.config.plain_yaml import PlainLoader, explained, load_yaml, read_yaml
from recyclable.config.settings import Settings
from recyclable.errors import InputError

Config = TypeVar("Config", bound=Settings)


def read_run_file(path: str | Path | None, overrides: list[str] | tuple[str, ...] = ()) -> dict[str, Any]:
    """What a YAML run config says, with `key=value` overrides applied (dots reach into sections); not checked yet.

    Without a path it is the overrides alone.

    Environment variables are expanded. Raises InputError for a missing file, broken YAML, anything but a mapping, an
    override that is none, a variable that is not set.
    """
    content = {} if path is None else read_yaml(Path(path), "a YAML run config", "a mapping of settings", _Loader)
    for override in overrides:
        _override(content, override)
    return _expand(content, path or "key=value")


def load_config(cls: type[Config], path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Read a run config as settings `cls`; environment variables in strings are expanded. Raises InputError."""
    return make_config(cls, read_run_file(path, overrides), path)


def make_config(cls: type[Config], content: dict[str, Any], where: object) -> Config:
    """Validate a mapping as settings `cls`; InputError names `where` and each wrong field."""
    try:
        return cls.model_validate(_expand(content, where))
    except ValidationError as error:
        raise InputError(where, "; ".join(_lines(cls, error.errors()))) from error


_MISSPELT = 0.8  # below it the key may well be another reader's: `start` is no slip for `store`
_OVER_ALL = " (over all ranks and accumulation steps; the latter are the ds_config's)"
_ELSEWHERE = {
    "model_name_or_path": ("base", ""),
    "output_dir": ("out", ""),
    "per_device_train_batch_size": ("train_batch_size", _OVER_ALL),
    "gradient_accumulation_steps": ("train_batch_size", _OVER_ALL),
    "per_device_eval_batch_size": ("eval_batch_size", " (per rank)"),
    "num_train_epochs": ("max_steps", ""),
    "warmup_ratio": ("warmup_steps", ""),
    "eval_steps": ("eval_every", ""),
    "save_steps": ("save_every", ""),
    "logging_steps": ("log_every", ""),
    "block_size": ("max_length", ""),
    "max_seq_length": ("max_length", ""),
}
"""Names of the Trainer's and its example scripts' for settings that have other names here, and what differs."""


class _Loader(PlainLoader):
    """YAML 1.1 reads 1e-4 as text; people mean a number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _override(content: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise InputError(override, "not understood, expected key=value")
    *sections, last = key.split(".")
    for section in sections:
        content = content.setdefault(section, {})
        if not isinstance(content, dict):
            raise InputError(override, f"{section} is not a section")
    try:
        content[last] = load_yaml(value, _Loader)
    except yaml.YAMLError as error:
        raise InputError(key, f"broken value: {explained(error)}, found {value[:40]!r}") from error


def _expand(content: dict[str, Any], where: object) -> dict[str, Any]:
    expanded = {}
    for key, value in content.items():
        try:
            expanded[key] = _expanded(value, where)
        except RecursionError as error:
            raise InputError(where, f"{key} is nested too deeply or holds itself, expected a plain value") from error
    return expanded


def _expanded(value: Any, where: object) -> Any:
    if isinstance(value, dict):
        return {k: _expanded(v, where) for k, v in value.items()}
    if isinstance(value, list):
        return [_expanded(v, where) for v in value]
    if isinstance(value, str) and "$" in value:
        expanded = os.path.expandvars(value)
        if unset := re.search(r"\$\{?(\w+)", expanded):
            raise InputError(where, f"{value!r} uses the environment variable {unset[1]}, which is not set")
        return expanded
    return value


def _lines(cls: type[Settings], errors: list[ErrorDetails]) -> list[str]:
    """One clause per mistake, but one for all keys that nothing reads."""
    lines, unread = [], []
    for error in errors:
        if error["type"] != "extra_forbidden":
            lines.append(_one_line(cls, error))
        elif near := _meant(cls, key := ".".join(map(str, error["loc"]))):
            lines.append(f"unknown key {key!r}, did you mean {near}?")
        else:
            unread.append(repr(key))
    if unread:
        read = f"{cls.reader()} reads {', '.join(sorted(cls.model_fields))}"
        lines.append(f"unknown key{'s' if len(unread) > 1 else ''} {', '.join(unread)}; {read}")
    return lines


def _meant(cls: type[Settings], key: str) -> str | None:
    """What was meant by a misspelt key, or by one that the Trainer or DeepSpeed has."""
    if near := difflib.get_close_matches(key, cls.model_fields, n=1, cutoff=_MISSPELT):
        return repr(near[0])
    ours, note = _ELSEWHERE.get(key, ("", ""))
    return f"{ours!r}{note}" if ours in cls.model_fields else None


def _one_line(cls: type[Settings], error: ErrorDetails) -> str:
    field = ".".join(str(part) for part in error["loc"]) or cls.__name__
    found = error["input"]
    match error["type"]:
        case "missing":
            return f"key {field!r} is missing"
        case "value_error":
            return f"{field}: {error['ctx']['error']}" if error["loc"] else str(error["ctx"]["error"])
        case _:
            return f"{field}: found {found!r}, expected: {error['msg'].removeprefix('Input should be ')}"
