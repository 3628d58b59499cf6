"""Finds things of one kind by name: the modules of their room, and what installed packages add to it.

A room is a package such as `recyclable.methods`: each of its modules holds one class, which bears the module's name. An
installed package adds its own by an entry point in the group of the room's name. Nothing is imported before it is asked
for.
"""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Callable
from functools import cached_property
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar, get_args

from recyclable.errors import InputError

T = TypeVar("T")


class Registry(Generic[T]):
    """The classes of a room by name.

    Args:
        room: the package, and the group of entry points.
        noun: what one of them is called in messages.
        protocol: gives the class that all of them derive from.
    """

    def __init__(self, room: str, noun: str, protocol: Callable[[], type[T]]) -> None:
        self.room, self.noun, self._protocol = room, noun, protocol

    @cached_property
    def _shipped(self) -> list[str]:
        return sorted(m.name for m in pkgutil.iter_modules(import_module(self.room).__path__) if not m.ispkg)

    @cached_property
    def _brought(self) -> dict[str, EntryPoint]:
        found: dict[str, EntryPoint] = {}
        for point in entry_points(group=self.room):
            owners = [self.origin_of(found[point.name])] if point.name in found else []
            owners += ["recyclable"] if point.name in self._shipped else []
            if owners:
                problem = f"{self.noun} {point.name!r} comes from {owners[0]} and from {self.origin_of(point)}"
                raise InputError(self.room, f"{problem}: uninstall one of them")
            found[point.name] = point
        return found

    def names(self) -> list[str]:
        """All names, the shipped ones first."""
        return [*self._shipped, *sorted(self._brought)]

    def origin(self, name: str) -> str:
        """The distribution that a name comes from."""
        return self.origin_of(self._brought[name]) if name in self._brought else "recyclable"

    @staticmethod
    def origin_of(point: EntryPoint) -> str:
        """The distribution of an entry point."""
        return point.dist.name if point.dist is not None else point.value

    def get(self, name: Any, where: object | None = None) -> type[T]:
        """The class of that name; InputError names `where` (None: the noun) and the names there are."""
        if name not in self.names():
            known = ", ".join(self.names())
            raise InputError(where or self.noun, f"{self.noun} is {name!r}, expected one of {known}")
        return self._load(name)

    def _load(self, name: str) -> type[T]:
        if name in self._shipped:
            module = import_module(f"{self.room}.{name}")
            inside = (c for c in vars(module).values() if isinstance(c, type) and c.__module__ == module.__name__)
            (found,) = (c for c in inside if issubclass(c, self._protocol()))
            return found
        point = self._brought[name]
        try:
            found = point.load()
        except (Exception, SystemExit) as error:  # somebody else's code
            problem = f"cannot be loaded from {self.origin_of(point)} ({type(error).__name__}: {error})"
            raise InputError(f"{self.noun} {name!r}", problem) from error
        if fault := self._fault(found, name):
            raise InputError(f"{self.noun} {name!r}", f"{point.value} of {self.origin_of(point)} {fault}")
        return found

    def _fault(self, found: Any, name: str) -> str | None:
        """What keeps something brought from being a class of the room, of that name."""
        if not (isinstance(found, type) and issubclass(found, self._protocol())):
            return f"is no {self._protocol().__name__}"
        if inspect.isabstract(found):
            missing = sorted(getattr(found, "__abstractmethods__", ()))
            return f"is abstract, expected a class that has {', '.join(missing)}"
        fields: dict[str, Any] = getattr(found, "model_fields", {})
        if (field := fields.get(self.noun)) is None:
            key, wanted, own = "name", repr(name), getattr(found, "name", None)
        else:  # a run config, which is read by its own key
            literal = get_args(field.annotation) == (field.default,)
            key, wanted, own = self.noun, f'Literal["{name}"] = "{name}"', field.default if literal else None
        if own != name:
            return f"has {f'{key} {own!r}' if isinstance(own, str) else f'no {key}'}, expected {key}: {wanted}"
        return None
