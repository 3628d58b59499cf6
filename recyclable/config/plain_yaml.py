"""YAML that anybody may have written: plain values, and one kind of error for whatever is wrong with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from recyclable.config.opening import read_text
from recyclable.errors import InputError

_MAX_BYTES = 1 << 20
_MAX_NODES = 1 << 20
"""Of a document whose aliases are written out: a few lines can stand for more than any memory holds."""

_MERGE = "tag:yaml.org,2002:merge"


class PlainLoader(yaml.SafeLoader):
    """A value that is not of its type (`!!int abc`, 2024-99-99, an integer of 5000 digits) is an error with a place."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, AttributeError, ArithmeticError) as error:
            problem = f"no value of the type {node.tag.rpartition(':')[2]} ({error})"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from error


def read_yaml(path: Path, expected: str, holds: str, loader: type[PlainLoader] = PlainLoader) -> dict[str, Any]:
    """The mapping in a file.

    Args:
        expected: what the file should be, for messages.
        holds: what should be in it.

    Raises InputError for one that cannot be read, is no YAML, or holds anything else.
    """
    try:
        content = load_yaml(read_text(path, _MAX_BYTES, expected), loader)
    except yaml.YAMLError as error:
        raise InputError(path, f"broken YAML: {explained(error)}") from error
    if not isinstance(content, dict):
        raise InputError(path, f"holds {type(content).__name__}, expected {holds}")
    return content


def load_yaml(text: str, loader: type[PlainLoader] = PlainLoader) -> Any:
    """What a YAML text says; YAMLError for all that is wrong with it."""
    made = None
    try:
        made = loader(text)  # refuses characters that YAML has not
        node = made.get_single_node()
        if node is None:
            return None
        _require_plain(node)
        return made.construct_document(node)
    except RecursionError as error:
        raise yaml.YAMLError("nested too deeply") from error
    finally:
        if made is not None:
            made.dispose()


def _require_plain(root: yaml.Node) -> None:
    """YAMLError where a node holds itself or a key twice, or the document is vast once its aliases are written out."""
    sizes: dict[int, int | None] = {}  # None: of a node whose inside is being looked at

    def size(node: yaml.Node) -> int:
        if (known := sizes.get(id(node), 0)) is None:
            raise yaml.constructor.ConstructorError(None, None, "holds itself by an alias", node.start_mark)
        if known:
            return known
        sizes[id(node)] = None
        if isinstance(node, yaml.MappingNode):
            _require_distinct(node)
        inner = node.value if isinstance(node, yaml.CollectionNode) else ()
        total = 1 + sum(size(each) for entry in inner for each in (entry if isinstance(entry, tuple) else (entry,)))
        if total > _MAX_NODES:
            problem = f"has more than {_MAX_NODES} values once aliases are written out"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        sizes[id(node)] = total
        return total

    size(root)


def _require_distinct(mapping: yaml.MappingNode) -> None:
    """YAMLError for a key that stands in it twice: of the two YAML keeps the last without a word."""
    seen = set[tuple[str, str]]()
    for key, _ in mapping.value:
        if isinstance(key, yaml.ScalarNode) and key.tag != _MERGE:
            if (known := (key.tag, key.value)) in seen:
                problem = f"key {key.value!r} stands in it twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(known)


def explained(error: yaml.YAMLError) -> str:
    """What is wrong, and where."""
    mark = getattr(error, "problem_mark", None)
    place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    return f"{place}{getattr(error, 'problem', error)}"
