"""The run config of `recyclable recycle`: an instance of the method that it names."""

from __future__ import annotations

from typing import Any

from recyclable.config.run_file import make_config
from recyclable.errors import InputError
from recyclable.methods import METHODS
from recyclable.methods.parts.method import Method


def read_recycle_settings(content: dict[str, Any], where: object) -> Method:
    """Raises InputError, also for a key that the method does not read."""
    if "method" not in content:
        raise InputError(where, f"key 'method' is missing, expected one of {', '.join(METHODS.names())}")
    return make_config(METHODS.get(content["method"], where), content, where)
