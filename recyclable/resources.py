"""Finds the launch scripts and DeepSpeed configs that ship with the package, from a checkout or installed."""

from __future__ import annotations

from pathlib import Path

from recyclable.errors import InputError

DEFAULT_DS_CONFIG = "cpu.json"
_PACKAGE = Path(__file__).parent


def launch_script(verb: str) -> Path:
    """The entry script the deepspeed launcher starts for a training verb, e.g. `tune` -> `.../launch/tune.py`."""
    script = _shipped("launch") / f"{verb}.py"
    if not script.is_file():
        verbs = ", ".join(sorted(path.stem for path in script.parent.glob("*.py")))
        raise InputError(verb, f"has no launch script, expected one of {verbs}")
    return script


def ds_config_path(name_or_path: str | Path) -> Path:
    """A DeepSpeed config given by path, or by the name (with or without .json) of a shipped one."""
    path = Path(name_or_path)
    if path.is_file():
        return path
    shipped = {file.stem: file for file in sorted(_shipped("ds_configs").glob("*.json"))}
    if path.name == str(name_or_path) and path.name.removesuffix(".json") in shipped:
        return shipped[path.name.removesuffix(".json")]
    raise InputError(
        name_or_path, f"is no DeepSpeed config: expected a JSON file or one of the shipped {', '.join(shipped)}"
    )


def default_ds_config() -> Path:
    """The config used when none is named: runs anywhere, ZeRO-2 in fp32 on CPU."""
    return ds_config_path(_shipped("ds_configs") / DEFAULT_DS_CONFIG)


def _shipped(directory: str) -> Path:
    """Inside the package once installed; beside it in a checkout and an editable install."""
    inside = _PACKAGE / directory
    return inside if inside.is_dir() else _PACKAGE.parent / directory
