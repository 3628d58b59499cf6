"""How a tokenizer writes a conversation as text: its chat templates, by content, whatever file they lie in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from recyclable.errors import InputError
from recyclable.weights.hashes import sha256_json
from recyclable.weights.strict_json import read_json

FILE = "chat_template.jinja"
FOLDER = "additional_chat_templates"
SETTINGS = "tokenizer_config.json"
LEGACY = "chat_template.json"
"""Of processors; read where nothing else says a template."""
_DEFAULT = "default"


def chat_template_digest(folder: Path) -> str | None:
    """SHA-256 (hex) of a directory's chat templates by their names; None where it has none."""
    found = chat_templates(folder)
    return sha256_json(found) if found else None


def chat_templates(folder: Path) -> dict[str, str]:
    """Name -> template, the one that is used where none is named as `default`; as transformers reads them.

    Files of their own go before what the tokenizer's settings say. Broken settings say nothing here: whoever loads the
    tokenizer tells of them.
    """
    files = {path.stem: path for path in sorted((folder / FOLDER).glob("*.jinja"))}
    if (folder / FILE).is_file():
        files[_DEFAULT] = folder / FILE
    if files:
        return {name: path.read_text(encoding="utf-8", errors="replace") for name, path in files.items()}
    return _said(folder / SETTINGS) or _said(folder / LEGACY)


def _said(file: Path) -> dict[str, str]:
    """What a JSON file has under `chat_template`: a template, a list of named ones, or nothing."""
    try:
        found: Any = read_json(file).get("chat_template")
    except InputError:
        return {}
    if isinstance(found, list):
        found = {each.get("name"): each.get("template") for each in found if isinstance(each, dict)}
    if not isinstance(found, dict):
        found = {_DEFAULT: found}
    return {name: text for name, text in found.items() if isinstance(name, str) and isinstance(text, str)}
