"""Canonical names of a backbone's tensors, the same whatever head or spelling a base was saved with."""

from __future__ import annotations

from transformers import MODEL_MAPPING, PretrainedConfig

from recyclable.errors import InputError

_OLD_SPELLING = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
"""Of every family: files of the time when TensorFlow's names were kept, which transformers renames as it loads them."""
_OLD_HEAD = "embed_out."
"""How an untied head is called in GPT-NeoX's files; transformers calls it `lm_head` as it loads them."""


def model_prefix(config: PretrainedConfig) -> str:
    """The attribute that holds the backbone in this architecture's models with heads, e.g. `bert`."""
    try:
        found = MODEL_MAPPING[type(config)]
    except KeyError as error:
        raise InputError("config.json", f"model_type is {config.model_type!r}, expected a model of text") from error
    return (found[0] if isinstance(found, tuple) else found).base_model_prefix


def canonical_name(name: str, prefix: str) -> str:
    """A tensor's name without the backbone's prefix and with today's spelling of layer norms."""
    for old, new in _OLD_SPELLING.items():
        name = name.removesuffix(old) + new if name.endswith(old) else name
    if name.startswith(_OLD_HEAD):
        return f"lm_head.{name.removeprefix(_OLD_HEAD)}"
    return name.removeprefix(prefix + ".")
