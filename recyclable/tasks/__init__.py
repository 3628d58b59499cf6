"""Kinds of labelled tasks: one file per kind, found by name (`problem` in a task file and in manifests)."""

from __future__ import annotations

from recyclable.registry import Registry
from recyclable.tasks.parts.kind import TaskKind

KINDS: Registry[TaskKind] = Registry("recyclable.tasks", "problem", lambda: TaskKind)


def every_kind() -> list[TaskKind]:
    """One of each."""
    return [KINDS.get(name)() for name in KINDS.names()]
