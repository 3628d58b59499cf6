"""What leaves as a plain directory besides its weights: the tokenizer that reads for it; and whether it opens again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from recyclable.architectures.structure import saved_buffers
from recyclable.carrying.carried import Carried
from recyclable.carrying.places import require_same
from recyclable.errors import InputError
from recyclable.models.build import structure
from recyclable.models.tasks import known_kind
from recyclable.weights.base import read_config
from recyclable.weights.checkpoint_files import TensorFiles
from recyclable.weights.durable import write_json
from recyclable.weights.strict_json import read_json
from recyclable.weights.vocabulary import copy_tokenizer, load_tokenizer

_SETTINGS = "tokenizer_config.json"


def write_tokenizer(carried: Carried, into: Path) -> None:
    """The tokenizer that reads for the weights on their new base, which cuts texts where theirs were cut."""
    reader, most = carried.reader, carried.weights.manifest.settings["max_length"]
    if not copy_tokenizer(reader.folder, into, reader.config):
        return
    settings = read_json(into / _SETTINGS) if (into / _SETTINGS).is_file() else {}
    kind = known_kind(carried.weights.manifest.task)
    changed: dict[str, Any] = {} if most is None else {"model_max_length": most}
    changed |= {} if kind is None else reader.settings(kind.model_class_for(reader.config))
    if any(settings.get(name) != value for name, value in changed.items()):
        settings.setdefault("tokenizer_class", type(load_tokenizer(reader.folder, reader.config)).__name__)
        write_json(into / _SETTINGS, {**settings, **changed})


def require_opens(folder: Path) -> PretrainedConfig:
    """A plain model's config; InputError unless its directory holds what that makes, and any tokenizer there fits."""
    config = read_config(folder)
    (architecture,) = config.architectures or [None]
    if architecture is None:
        raise InputError(folder / "config.json", "names no architecture")
    plan, files = structure(config, None, architecture), TensorFiles(folder)
    wanted = {name: tuple(parameter.shape) for name, parameter in plan.named_parameters()}
    beside = saved_buffers(plan)
    require_same(folder, {name: files.shape(name) for name in files.names if name not in beside}, wanted)
    if (folder / _SETTINGS).is_file():
        load_tokenizer(folder, config)
    return config
