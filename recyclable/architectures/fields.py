"""Which fields of a config decide what the weights compute: all that differ from what its class makes of the others.

A version of transformers that adds a field, with a default or made from the others, so changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, TypeVar

from transformers import PretrainedConfig

from recyclable.architectures.dropout import is_dropout
from recyclable.errors import InputError

C = TypeVar("C", bound=PretrainedConfig)
HEAD_FIELDS = ("id2label", "label2id", "problem_type")
"""What a config says of the head for a task."""
_BOOKKEEPING = frozenset(
    (
        # where it comes from and how it is stored
        *("_name_or_path", "name_or_path", "_commit_hash", "transformers_version", "architectures", "auto_map"),
        *("dtype", "torch_dtype", "use_bfloat16", "tokenizer_class"),
        # a task's: the head travels with the task's weights, its labels with their manifest
        *HEAD_FIELDS,
        *("num_labels", "_num_labels", "finetuning_task", "task_specific_params"),
        # what is returned, and how the same is computed
        *("output_attentions", "_output_attentions", "output_hidden_states", "output_router_logits", "output_scores"),
        *("output_past", "return_dict", "return_dict_in_generate", "use_cache", "torchscript", "tf_legacy_loss"),
        *("attn_implementation", "_attn_implementation", "_attn_implementation_autoset", "experts_implementation"),
        *("gradient_checkpointing", "chunk_size_feed_forward"),
        # how text is generated (transformers drops the others as it reads a config)
        *("forced_bos_token_id", "forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens"),
    )
)
_LAYERS = ("num_hidden_layers", "encoder_layers", "decoder_layers", "num_decoder_layers")
_FRESH_WEIGHTS = ("initializer_", "init_std")
"""How names of fields begin that say how weights are drawn."""


def computing_fields(config: PretrainedConfig) -> dict[str, Any]:
    """Field -> value, for JSON; of a config inside another likewise, under its name."""
    found, default = _computing(config), _default(type(config))  # type: ignore[arg-type]  # see _default
    if default is not None:
        found = {name: value for name, value in found.items() if name not in default or default[name] != value}
        for name in sorted(found):
            if _follows(name, found, type(config)):
                del found[name]
    return {"model_type": config.model_type, **found}


def dropping_fields(config: PretrainedConfig) -> dict[str, Any]:
    """Field -> value of the rates at which training leaves anything out; of a config inside another likewise."""
    found = {name: value for name, value in config.to_dict().items() if value and _is_left_out(name, value)}
    inner = {name: value for name, value in vars(config).items() if isinstance(value, PretrainedConfig)}
    return found | {name: fields for name, value in inner.items() if (fields := dropping_fields(value))}


def differing_fields(one: PretrainedConfig, other: PretrainedConfig) -> dict[str, tuple[Any, Any]]:
    """Field -> its two values, of those that make configs of one class compute differently.

    A field that the class does not know counts only where both have it.
    """
    first, second = _computing(one), _computing(other)
    known = _default(type(one)) or {}  # type: ignore[arg-type]  # see _default
    names = sorted((first.keys() & second.keys()) | ((first.keys() | second.keys()) & known.keys()))
    return {n: (first.get(n), second.get(n)) for n in names if first.get(n) != second.get(n)}


def tuned_fields(tuned: PretrainedConfig, base: PretrainedConfig) -> dict[str, Any]:
    """Field -> the tuned model's value, of those that make it compute differently than its base's config would.

    Of a config inside another it is the fields of that one. `with_fields` puts them on a base's config.
    """
    found = {name: value for name, (value, _) in differing_fields(tuned, base).items()}
    for name in found:
        inner, of_base = getattr(tuned, name, None), getattr(base, name, None)
        if isinstance(inner, PretrainedConfig) and isinstance(of_base, PretrainedConfig):
            found[name] = tuned_fields(inner, of_base)
    return found


def with_fields(config: C, fields: Mapping[str, Any]) -> C:
    """The config, in a copy where any field gets another value; what its class makes of them follows.

    Raises InputError for what is no such field, or no value that the class takes: they may be a stranger's.
    """
    if not fields:
        return config
    if other := sorted(name for name in fields if name not in HEAD_FIELDS and _is_bookkeeping(name, fields[name])):
        raise InputError("config", f"has {', '.join(other)}, expected fields that decide what weights compute")
    content, place = config.to_dict(), config.name_or_path
    try:
        for name, value in fields.items():
            inner = getattr(config, name, None)
            content[name] = with_fields(inner, value).to_dict() if isinstance(inner, PretrainedConfig) else value
        changed = type(config).from_dict(content, return_dict=True)
    except InputError:
        raise
    except Exception as error:  # every kind checks its fields in its own way
        raise InputError("config", f"{', '.join(sorted(fields))} cannot be used: {error}") from error
    for name in _LAYERS:  # of a billion no structure would ever be made
        if (found := getattr(changed, name, None)) != (wanted := getattr(config, name, None)):
            raise InputError("config", f"{name} is {found}, expected {wanted} as in the base's")
    changed.name_or_path = place
    return changed


def _computing(config: PretrainedConfig) -> dict[str, Any]:
    found = {name: value for name, value in config.to_dict().items() if not _is_bookkeeping(name, value)}
    inner = {name: value for name, value in vars(config).items() if isinstance(value, PretrainedConfig)}
    return found | {name: computing_fields(value) for name, value in inner.items()}


def _is_bookkeeping(name: str, value: object) -> bool:
    training_only = _is_left_out(name, value) or name.startswith(_FRESH_WEIGHTS)
    return name in _BOOKKEEPING or training_only or name == "model_type" or name.endswith("_implementation")


def _is_left_out(name: str, value: object) -> bool:
    return is_dropout(name, value) or "layerdrop" in name


@cache
def _default(config_class: type[PretrainedConfig]) -> dict[str, Any] | None:
    """The fields of a class's own defaults; None for a class that has none for all of its fields."""
    # mypy takes no class for Hashable, which the stub of `cache` asks for
    try:
        return _computing(config_class())
    except Exception:  # whatever a class makes of arguments that it lacks
        return None


def _follows(name: str, found: dict[str, Any], config_class: type[PretrainedConfig]) -> bool:
    """Whether the class makes this value from the other fields (`layer_types` from the number of layers)."""
    try:
        made = _computing(config_class(**{other: value for other, value in found.items() if other != name}))
    except Exception:  # it does not go without it
        return False
    return name in made and made[name] == found[name]
