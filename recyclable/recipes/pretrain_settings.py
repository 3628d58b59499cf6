"""The run config of `recyclable pretrain`: an instance of the kind of language model it names, or that its base is."""

from __future__ import annotations

from typing import Any

from recyclable.config.run_file import make_config
from recyclable.errors import InputError
from recyclable.lm import DEFAULT, LM_KINDS
from recyclable.lm.parts.kind import LMKind
from recyclable.weights.locate import locate
from recyclable.weights.strict_json import read_json


def read_pretrain_settings(content: dict[str, Any], where: object) -> LMKind:
    """Of the kind that the base itself is where it names none. Raises InputError."""
    named = content.get("lm") or kind_of(content.get("base"))
    return make_config(LM_KINDS.get(named, where), content, where)


def kind_of(base: Any) -> str:
    """The name of the kind that a base is by its config.json; the default of one that cannot be read (yet)."""
    try:
        config = read_json(locate(base) / "config.json") if isinstance(base, str) else {}
    except InputError:  # whoever opens it says so
        return DEFAULT
    return claimed(config)


def claimed(config: dict[str, Any]) -> str:
    """The name of the kind that a base with this config.json is; the default where none claims it."""
    return next((name for name in LM_KINDS.names() if LM_KINDS.get(name).claims(config)), DEFAULT)
