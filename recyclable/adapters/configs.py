"""Reads the config of a PEFT adapter that came from anywhere: only what needs nothing but its own tensors."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from peft import PeftConfig

from recyclable.errors import InputError
from recyclable.weights.manifest import ADAPTER_CONFIG
from recyclable.weights.own_files import require_own_files
from recyclable.weights.strict_json import read_json

NOTHING: Mapping[str, Any] = MappingProxyType({})
# Fields by which an adapter reads other files, imports modules, or needs more than its own tensors to be rebuilt.
_NEED_MORE = (
    *("adapters", "arrow_config", "corda_config", "loftq_config", "lora_ga_config", "megatron_config"),
    *("prompt_tuning_init_state_dict_path", "shadow_model", "tokenizer_kwargs"),
)
_OWN_TWIN = ("shadow_model", "mirror")  # what it is unless it names another model
_PER_TEXT = ("n_tasks", "num_tasks")  # the kinds that have these want the id of a task with every text
# Kinds (with this setting) whose tensors are relative to a decomposition of the base's weights that no file holds.
_OF_ONE_BASE: dict[str, tuple[str, Any] | None] = {
    "ADAMSS": None,
    "FROD": ("save_projection", False),
    "OSF": None,
    "PSOFT": None,
    "SUPERTUNING": ("save_precomputed_indices", False),
}
# What a prompt encoder computed is what its file holds, so without the encoder these are plain prompts and prefixes.
_AS_PROMPTS = {"P_TUNING": "PROMPT_TUNING", "PREFIX_TUNING": "PREFIX_TUNING", "CARTRIDGE": "PREFIX_TUNING"}
_OF_PROMPTS = (
    *("task_type", "inference_mode", "base_model_name_or_path", "revision", "modules_to_save", "num_virtual_tokens"),
    *("token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers"),
)
_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_UNBOUNDED = re.compile(r"(?<!\\)[*+]|\{\d*,\d*\}|\{\d{3,}")
_REPEATED_GROUP = re.compile(r"(?<!\\)\)[*+{]")
_MAX_UNBOUNDED = 4
_MAX_SIZE = {"num_virtual_tokens": 1 << 10, "encoder_hidden_size": 1 << 14}
_MAX_NUMBER = 1 << 20


def read_adapter_config(folder: Path, fields: Mapping[str, Any] = NOTHING) -> PeftConfig:
    """The config in a PEFT directory, ready to train.

    Args:
        fields: values that take the place of those in the file.

    Raises InputError when it is missing, broken, of a kind that peft does not know, or asks for what a directory of
    its own tensors cannot give: files elsewhere, other modules, a base with changed weights.
    """
    file = folder / ADAPTER_CONFIG
    if not file.is_file():
        raise InputError(folder, f"holds no {ADAPTER_CONFIG}, expected a PEFT adapter")
    require_own_files(folder)
    content = {**read_json(file), **fields}
    if not isinstance(content.get("peft_type"), str):
        raise InputError(file, f"peft_type is {content.get('peft_type')!r}, expected the kind of the adapter")
    for field in _NEED_MORE:
        if content.get(field) and (field, content[field]) != _OWN_TWIN:
            raise InputError(
                file, f"{field} is {content[field]!r}, expected an adapter that needs its own tensors only"
            )
    kind = content["peft_type"]
    for field in _PER_TEXT:
        if field in content:
            raise InputError(file, f"{kind} wants the id of a task with every text, expected an adapter for one task")
    if kind == "SHADOW" and content.get("task_type") != "CAUSAL_LM":
        raise InputError(file, f"{kind} runs beside a decoder, task_type is {content.get('task_type')!r}")
    if kind in _OF_ONE_BASE:
        setting = _OF_ONE_BASE[kind]
        if setting is None or content.get(setting[0]) == setting[1]:
            told = "" if setting is None else f" with {setting[0]} {setting[1]}"
            raise InputError(
                file,
                f"{kind}{told} is relative to a decomposition of the very base it was tuned on, which is not in the "
                "file: it means nothing on another",
            )
    start = content.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGE_THE_BASE):
        raise InputError(
            file,
            f"init_lora_weights is {start!r}, which changes the base's own weights; save the adapter as plain LoRA "
            "(peft: path_initial_model_for_weight_conversion)",
        )
    for place, value in _leaves(content, ""):
        if isinstance(value, str) and may_take_forever(value):
            raise InputError(file, f"{place} is {value!r}, a pattern that may take forever to match")
        if isinstance(value, int | float) and not abs(value) <= _MAX_SIZE.get(place, _MAX_NUMBER):
            raise InputError(file, f"{place} is {value}, expected a number that makes sense in a model")
        if place.endswith("dropout") and not (isinstance(value, int | float) and 0 <= value < 1):
            raise InputError(file, f"{place} is {value!r}, expected a share from 0 to below 1")
    whole = content.get("modules_to_save")
    if whole is not None and not (isinstance(whole, list) and all(isinstance(name, str) for name in whole)):
        raise InputError(file, f"modules_to_save is {whole!r}, expected a list of names")
    content.update(inference_mode=False, base_model_name_or_path=None)
    content.pop("runtime_config", None)
    if isinstance(start, str) and start != "gaussian":
        content["init_lora_weights"] = True
    if kind in _AS_PROMPTS:
        content = {"peft_type": _AS_PROMPTS[kind], **{f: content[f] for f in _OF_PROMPTS if f in content}}
    if "prompt_tuning_init" in content:
        content["prompt_tuning_init"] = "RANDOM"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of fields that other versions of peft have
            return PeftConfig.from_peft_type(**content)
    except Exception as error:  # every kind checks its fields in its own way
        raise InputError(file, f"peft cannot use it ({type(error).__name__}: {error})") from error


def may_take_forever(pattern: str) -> bool:
    """Whether a regular expression is of a kind that some names take forever to match."""
    return bool(_REPEATED_GROUP.search(pattern)) or len(_UNBOUNDED.findall(pattern)) > _MAX_UNBOUNDED


def _leaves(value: Any, place: str) -> Iterator[tuple[str, Any]]:
    """(where it stands, value) of everything in a config that is no container; keys as well, they may be patterns."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if place:
                yield place, key
            yield from _leaves(inner, f"{place}.{key}" if place else key)
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(inner, place)
    else:
        yield place, value
