"""YAML that anybody may have written: plain values, and one kind of error for whatever is wrong with it."""

from __future__ import annotations

from typing import Any

import yaml


class PlainLoader(yaml.SafeLoader):
    """A value that is not of its type (`!!int abc`, 2024-99-99, an integer of 5000 digits) is an error with a place."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, AttributeError, ArithmeticError) as error:
            problem = f"no value of the type {node.tag.rpartition(':')[2]} ({error})"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from error


def load_yaml(text: str, loader: type[PlainLoader] = PlainLoader) -> Any:
    """What a YAML text says; YAMLError for all that is wrong with it."""
    try:
        return yaml.load(text, loader)
    except RecursionError as error:
        raise yaml.YAMLError("nested too deeply") from error


def explained(error: yaml.YAMLError) -> str:
    """What is wrong, and where."""
    mark = getattr(error, "problem_mark", None)
    place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    return f"{place}{getattr(error, 'problem', error)}"
