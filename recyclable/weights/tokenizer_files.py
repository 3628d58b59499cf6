"""Which files a tokenizer is made of: those that its class reads, and those that every class may have."""

from __future__ import annotations

from pathlib import Path

from transformers import PretrainedConfig, PreTrainedTokenizerBase
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING, tokenizer_class_from_name

from recyclable.errors import InputError
from recyclable.weights import chat_template
from recyclable.weights.base import read_config
from recyclable.weights.strict_json import read_json

_OF_EVERY_CLASS = (
    *("tokenizer*", "vocab*", "merges.txt", "*.model", "special_tokens_map.json", "added_tokens.json"),
    *(chat_template.FILE, chat_template.LEGACY, f"{chat_template.FOLDER}/*.jinja"),
)


def class_files(folder: Path, config: PretrainedConfig | None = None) -> frozenset[str]:
    """The names of the files that a directory's tokenizer is read from by its class, whether they are there or not.

    The class is the one that the tokenizer's or the model's config names, or that the model's type has: one of them is
    the one that transformers takes.

    Args:
        config: of the model; None is the directory's own, if it has one.
    """
    files = (getattr(kind, "vocab_files_names", {}).values() for kind in _classes(folder, config))
    return frozenset(name for names in files for name in names)


def tokenizer_files(folder: Path, config: PretrainedConfig | None = None) -> list[str]:
    """The files of a directory's tokenizer that are there: sorted names, with `/` where one lies deeper.

    Args:
        config: as in `class_files`.
    """
    patterns = (*_OF_EVERY_CLASS, *class_files(folder, config))
    found = {file for pattern in patterns for file in folder.glob(pattern) if file.is_file()}
    return sorted(file.relative_to(folder).as_posix() for file in found)


def _classes(folder: Path, config: PretrainedConfig | None) -> list[type[PreTrainedTokenizerBase]]:
    try:
        config = config or read_config(folder)
    except InputError:  # whoever needs it says so
        config = None
    try:
        named = [read_json(folder / "tokenizer_config.json").get("tokenizer_class")]
    except InputError:
        named = []
    named.append(getattr(config, "tokenizer_class", None))
    found = [tokenizer_class_from_name(name) for name in named if isinstance(name, str)]
    found.append(TOKENIZER_MAPPING.get(type(config), None))
    return [kind for kind in found if isinstance(kind, type) and issubclass(kind, PreTrainedTokenizerBase)]
