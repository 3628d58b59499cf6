"""By what a tokenizer reads a text: the same for two directories that read all texts alike, however they were saved."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig, PreTrainedTokenizerBase, TokenizersBackend

from recyclable.errors import InputError
from recyclable.weights.hashes import sha256_file, sha256_json
from recyclable.weights.strict_json import read_json
from recyclable.weights.vocabulary import load_tokenizer

_IN_BACKEND = ("tokenizer_file", "vocab_file", "merges_file")
"""Files whose content a backend of the `tokenizers` library holds, by what classes call them."""
_NOT_READING = ("version", "truncation", "padding", "decoder")
"""Parts of such a backend that change no id of a whole text."""
_NO_OPTIONS = ("vocab", "merges", "entity_vocab", "model_max_length", "errors", "clean_up_tokenization_spaces")
"""Arguments of classes that are told otherwise, or change no id."""
_READS = ("__call__", "_encode_plus", "_batch_encode_plus", "prepare_for_model", "pad", "_pad")
"""The methods that make a model's inputs of a text."""


def reading_digest(folder: Path, config: PretrainedConfig | None = None) -> str:
    """SHA-256 (hex) of `reading`; to be compared only with one that the same version of transformers gave."""
    return sha256_json(reading(folder, config))


def reading(folder: Path, config: PretrainedConfig | None = None) -> dict[str, Any]:
    """All by which a directory's tokenizer makes a model's inputs of a text, for JSON.

    Of one that the `tokenizers` library computes, what it computes with; of one in Python its class, options,
    vocabulary and the files these are made from. How many tokens a text is cut to is no part of it.

    Args:
        config: as in `weights.vocabulary.load_tokenizer`.

    Raises InputError when there is no usable tokenizer.
    """
    tokenizer = load_tokenizer(folder, config)
    found = {
        "inputs": list(tokenizer.model_input_names),
        "cut": tokenizer.truncation_side,
        "padded": [tokenizer.padding_side, tokenizer.pad_token_type_id],
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "extra": sorted(map(str, tokenizer.extra_special_tokens)),
        "split_special_tokens": tokenizer.split_special_tokens,
        "template": tokenizer.chat_template,
    }
    fast, kind = isinstance(tokenizer, TokenizersBackend), type(tokenizer)
    if fast:
        backend = json.loads(tokenizer.backend_tokenizer.to_str())
        found["backend"] = {part: value for part, value in backend.items() if part not in _NOT_READING}
    else:
        found["vocabulary"] = tokenizer.get_vocab() if tokenizer.vocab_files_names else None  # its class is all
        found["added"] = {row: token.__getstate__() for row, token in tokenizer.added_tokens_decoder.items()}
    found["files"] = dict(_files(tokenizer, folder, _IN_BACKEND if fast else ("tokenizer_file",)))
    if not fast or any(getattr(kind, name, None) is not getattr(TokenizersBackend, name, None) for name in _READS):
        found["class"], found["options"] = kind.__name__.removesuffix("Fast"), _options(tokenizer)
    return found


def _files(tokenizer: PreTrainedTokenizerBase, folder: Path, left_out: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """What the tokenizer calls a file, and a digest of its content; of JSON blind to its layout."""
    for name, file in tokenizer.vocab_files_names.items():
        if name in left_out or not (folder / file).is_file():
            continue
        try:
            yield name, sha256_json(read_json(folder / file))
        except InputError:
            yield name, sha256_file(folder / file)


def _options(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What the tokenizer's class was made with, given or by default."""
    found = {}
    for kind in type(tokenizer).__mro__:
        if not issubclass(kind, PreTrainedTokenizerBase) or "__init__" not in vars(kind):
            continue
        for name, argument in inspect.signature(vars(kind)["__init__"]).parameters.items():
            named = argument.kind in (argument.POSITIONAL_OR_KEYWORD, argument.KEYWORD_ONLY) and name != "self"
            if named and name not in _NO_OPTIONS and not name.endswith(("_token", "_tokens", "_file")):
                found[name] = tokenizer.init_kwargs.get(name, getattr(tokenizer, name, argument.default))
    return found
