"""A base as data: its backbone's tensors under canonical names, whatever head or spelling it was saved with."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig

from recyclable.architectures.names import canonical_name, model_prefix
from recyclable.architectures.structure import Structure
from recyclable.config.opening import read_text
from recyclable.errors import InputError
from recyclable.weights.checkpoint_files import Renamed, Source
from recyclable.weights.digest import Digested
from recyclable.weights.layouts import model_files
from recyclable.weights.locate import inside
from recyclable.weights.own_files import require_own_files

_CHUNK = 1 << 22  # elements compared at a time
_PARTS = ("layer", "layers", "experts", "heads")
_MAX_BYTES = 1 << 26
_MOST_PARTS = 10_000  # the deepest published networks have about 1000 layers, the most experts are 2048
_MOST_LABELS = 1 << 20


def read_config(folder: Path) -> PretrainedConfig:
    """The model config of a directory, or that file itself; InputError when it is missing or broken."""
    file = folder if folder.is_file() else folder / "config.json"
    if not file.is_file():
        wanted = "expected a model directory in Hugging Face format"
        raise InputError(folder, f"has no config.json, {wanted}{inside(folder, file.name)}")
    if folder.is_dir():
        require_own_files(folder)
    try:
        content = json.loads(read_text(file, _MAX_BYTES))
        if wrong := _impossible(content):
            raise InputError(file, wrong)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, return_dict=True)
        kernels = _kernels_from_elsewhere(content)
    except InputError:
        raise
    except Exception as error:  # every kind checks its fields in its own way
        raise InputError(file, f"cannot be used: {reason(error)}") from error
    named = config.architectures or []
    if not (isinstance(named, list) and all(isinstance(name, str) for name in named)):
        raise InputError(file, f"architectures is {named!r}, expected a list of names")
    if kernels:
        raise InputError(file, f"names code from elsewhere, which is never run: {', '.join(kernels)}")
    return config


def reason(error: Exception) -> str:
    """What transformers says is wrong, without its offer to run a directory's own Python: that never happens here."""
    if "trust_remote_code" in str(error):
        return "it needs Python code of its own (auto_map), which is never run; expected a kind that transformers has"
    return str(error).partition("\nModel type should be one of")[0]  # all hundreds of them


def _impossible(content: Any) -> str | None:
    """What a config has more of than any model, so that making them would not end, or less than none, or NaN of."""
    if isinstance(content, list):
        return next(filter(None, map(_impossible, content)), None)
    if not isinstance(content, dict):
        return None
    for key, value in content.items():
        counts = key.endswith(_PARTS) and isinstance(value, int | float)
        least = -_MOST_PARTS if key.endswith("layer") else 0  # `vision_feature_layer: -2` is a place
        if counts and not least <= value <= _MOST_PARTS:
            return f"{key} is {value}, expected 0 to {_MOST_PARTS}"
        if key.endswith("num_labels") and isinstance(value, int) and value > _MOST_LABELS:  # each gets a name
            return f"{key} is {value}, expected {_MOST_LABELS} at most"
        if value != value:  # transformers writes Infinity for some families, NaN for none
            return f"{key} is {value}, expected a number"
        if inner := _impossible(value):
            return inner
    return None


def _kernels_from_elsewhere(content: Any) -> list[str]:
    """What a config asks to be computed by a package of the hub (`attn_implementation`), whatever part of it does."""
    if not isinstance(content, dict):
        return []
    named = [f"{key} {value!r}" for key, value in content.items() if "_implementation" in key and "/" in str(value)]
    return named + [inner for value in content.values() for inner in _kernels_from_elsewhere(value)]


class Base(Renamed):
    """The tensors that identify a base: backbone, and a pre-trained untied LM head. Heads and pooler are left out.

    The pooler is left out because masked-LM pre-training neither uses nor changes it: it travels with the head.

    Args:
        files: tensors that take the place of those in the directory.
    """

    def __init__(self, folder: str | Path, files: Source | None = None) -> None:
        self.folder = Path(folder)
        self.config = read_config(self.folder)
        self.prefix = model_prefix(self.config)
        self.structure = Structure(self.config)
        files = model_files(self.folder, self.structure) if files is None else files
        self.structure.parted = self._parted(files)
        prefixed = any(name.startswith(self.prefix + ".") for name in files.names)
        stored_name: dict[str, str] = {}
        for name in files.names:
            canonical = canonical_name(name, self.prefix)
            own = self.structure.aliases.get(canonical, canonical)
            if self._is_part(name, canonical, prefixed) and (own == canonical or own not in stored_name):
                stored_name[own] = name
        if not stored_name:
            raise InputError(self.folder, "holds no backbone tensors")
        super().__init__(files, stored_name)
        self.hashed = Digested(self)
        """The same tensors; what is read through this need not be read again for the fingerprint."""

    def lacks(self, names: Sequence[str]) -> InputError:
        """What is wrong with a base without these tensors of its backbone."""
        return InputError(self.folder, f"lacks {len(names)} backbone tensors: {', '.join(names)}")

    def _parted(self, files: Source) -> bool:
        """Whether the files hold an output embedding of its own that the class would tie: then they win.

        So it is in transformers, and with T5 1.1, Flan-T5, mT5 and UMT5.
        """
        stored = {canonical_name(name, self.prefix): name for name in files.names}
        if not (self.structure.head & stored.keys() and self.structure.always_tied):
            return False
        (head,) = self.structure.head
        words = next((name for name in itertools.chain(*self.structure.aliases.items()) if name in stored), None)
        if words is None or files.shape(stored[words]) != files.shape(stored[head]):
            return False
        size = math.prod(files.shape(stored[head]))
        for start in range(0, size, _CHUNK):
            pieces = (files.read(stored[name], start, min(start + _CHUNK, size)) for name in (head, words))
            if not torch.equal(*pieces):
                return True
        return False

    def _is_part(self, name: str, canonical: str, prefixed: bool) -> bool:
        """Whether a tensor in the files identifies the base."""
        if canonical not in self.structure.names and canonical in self.structure.head:
            return canonical in self.structure.untied_head
        inside = not prefixed or name.startswith(f"{self.prefix}.")
        return inside and not canonical.startswith("pooler.") and not self.structure.is_leftover(canonical)
