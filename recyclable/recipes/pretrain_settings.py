"""The run config of `recyclable pretrain`: an instance of the kind of language model that it names."""

from __future__ import annotations

from typing import Any

from recyclable.config.run_file import make_config
from recyclable.lm import DEFAULT, LM_KINDS
from recyclable.lm.parts.kind import LMKind


def read_pretrain_settings(content: dict[str, Any], where: object) -> LMKind:
    """Masked language modelling where it names no kind. Raises InputError."""
    return make_config(LM_KINDS.get(content.get("lm") or DEFAULT, where), content, where)
