"""A base as data: its backbone's tensors under canonical names, whatever head or spelling it was saved with."""

from __future__ import annotations

from pathlib import Path

from transformers import MODEL_MAPPING, AutoConfig, PretrainedConfig

from recyclable.errors import InputError
from recyclable.weights.checkpoint_files import Renamed, TensorFiles
from recyclable.weights.digest import Digested

_OLD_SPELLING = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
BUFFERS = ("position_ids", "token_type_ids")
"""How names end that stand in some old files and are no weights."""


def model_prefix(config: PretrainedConfig) -> str:
    """The attribute that holds the backbone in this architecture's models with heads, e.g. `bert`."""
    return MODEL_MAPPING[type(config)].base_model_prefix


def canonical_name(name: str, prefix: str) -> str:
    """A tensor's name without the backbone's prefix and with today's spelling of layer norms."""
    for old, new in _OLD_SPELLING.items():
        name = name.removesuffix(old) + new if name.endswith(old) else name
    return name.removeprefix(prefix + ".")


def read_config(folder: Path) -> PretrainedConfig:
    """The model config of a directory; InputError when it is missing or broken."""
    file = folder / "config.json"
    if not file.is_file():
        raise InputError(folder, "has no config.json, expected a model directory in Hugging Face format")
    try:
        return AutoConfig.from_pretrained(folder)
    except (ValueError, OSError, KeyError) as error:
        raise InputError(file, f"cannot be used: {error}") from error


class Base(Renamed):
    """The tensors that identify a base: backbone, and a pre-trained untied LM head. Heads and pooler are left out.

    The pooler is left out because masked-LM pre-training neither uses nor changes it: it travels with the head.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.config = read_config(self.folder)
        self.prefix = model_prefix(self.config)
        files = TensorFiles(self.folder)
        prefixed = any(name.startswith(self.prefix + ".") for name in files.names)
        stored_name: dict[str, str] = {}
        for name in files.names:
            canonical = canonical_name(name, self.prefix)
            inside = not prefixed or name.startswith(self.prefix + ".") or self._is_untied_lm_head(name)
            if inside and not canonical.startswith("pooler.") and not name.endswith(BUFFERS):
                stored_name[canonical] = name
        if not stored_name:
            raise InputError(self.folder, "holds no backbone tensors")
        super().__init__(files, stored_name)
        self.hashed = Digested(self)
        """The same tensors; what is read through this need not be read again for the fingerprint."""

    def _is_untied_lm_head(self, name: str) -> bool:
        return name == "lm_head.weight" and not getattr(self.config, "tie_word_embeddings", True)
