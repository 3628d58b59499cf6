"""What leaves as a plain directory besides its weights: how it reads and generates text; and whether it opens again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers
from transformers import PretrainedConfig, PreTrainedModel

from recyclable.architectures.structure import Structure, saved_buffers
from recyclable.carrying.carried import Carried
from recyclable.carrying.places import require_same
from recyclable.errors import InputError
from recyclable.models.build import structure
from recyclable.models.tasks import known_kind
from recyclable.weights.base import read_config
from recyclable.weights.durable import write_json
from recyclable.weights.generation_file import FILE, told_of
from recyclable.weights.generation_rules import TOKENS, rules_of
from recyclable.weights.layouts import model_files
from recyclable.weights.manifest import GENERATION
from recyclable.weights.strict_json import read_json
from recyclable.weights.tokenizer_files import tokenizer_files
from recyclable.weights.vocabulary import copy_tokenizer, load_tokenizer

_SETTINGS = "tokenizer_config.json"


def write_tokenizer(carried: Carried, into: Path) -> None:
    """The tokenizer that reads for the weights on their new base, which cuts texts where theirs were cut.

    What answers in text was trained on texts of a length, and is not held to it.
    """
    reader, most = carried.reader, carried.weights.manifest.settings["max_length"]
    if not copy_tokenizer(reader.folder, into, reader.config):
        return
    settings = read_json(into / _SETTINGS) if (into / _SETTINGS).is_file() else {}
    kind = known_kind(carried.weights.manifest.task)
    cuts = most is not None and not (kind is not None and kind.over_vocabulary)
    changed: dict[str, Any] = {"model_max_length": most} if cuts else {}
    changed |= {} if kind is None else reader.settings(kind.model_class_for(reader.config))
    if any(settings.get(name) != value for name, value in changed.items()):
        settings.setdefault("tokenizer_class", type(load_tokenizer(reader.folder, reader.config)).__name__)
        write_json(into / _SETTINGS, {**settings, **changed})


def write_generation(carried: Carried, model: PreTrainedModel, into: Path) -> None:
    """How text is generated from a language model, which stops where ours does; its config no longer says it.

    Args:
        model: of the weights on their new base, whose config is about to be saved.
    """
    vars(model.config).pop(GENERATION, None)
    reader = carried.reader
    if not (model.can_generate() and tokenizer_files(reader.folder, reader.config)):
        return
    rules = rules_of(reader.config, reader.tokenizer())
    tokens = {name: getattr(rules, name) for name in TOKENS}
    told = (told_of(reader.config) or {}) | {name: token for name, token in tokens.items() if token is not None}
    write_json(into / FILE, {**told, "transformers_version": transformers.__version__})


def require_opens(folder: Path) -> PretrainedConfig:
    """A plain model's config; InputError unless its directory holds what that makes, and any tokenizer there fits."""
    config = read_config(folder)
    (architecture,) = config.architectures or [None]
    if architecture is None:
        raise InputError(folder / "config.json", "names no architecture")
    plan, files = structure(config, None, architecture), model_files(folder, Structure(config))
    wanted = {name: tuple(parameter.shape) for name, parameter in plan.named_parameters()}
    beside = saved_buffers(plan)
    require_same(folder, {name: files.shape(name) for name in files.names if name not in beside}, wanted)
    if (folder / _SETTINGS).is_file():
        load_tokenizer(folder, config)
    return config
