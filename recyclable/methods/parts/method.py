"""What every method is: the settings all share, where its student starts, what it learns from, what it needs.

Heavy imports wait until a run needs them: settings are read before anything is started.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, get_args

from pydantic import Field

from recyclable.config.settings import TaskSettings

if TYPE_CHECKING:
    from torch import nn

    from recyclable.methods.parts.scene import Scene
    from recyclable.tasks.parts.kind import TaskKind


class Method(TaskSettings):
    """One way to recycle; an instance is the run config of one run of it."""

    wants_other_tasks: ClassVar[bool] = False
    """Whether it takes weights of other tasks on both bases (`project_from`); a study gives it its own tasks'."""

    method: str
    """The method's name."""
    max_length: int | None = Field(None, gt=2)  # type: ignore[assignment]  # wider: settled before anybody asks
    """Tokens per text, special tokens included; null: as the outdated weights were tuned."""
    weights: str
    """The outdated adapted weights: a directory, or a name in the store."""
    store: str | None = None
    """The store's directory; null: the environment's RECYCLABLE_STORE, else ./store."""
    old_base: str
    """The base the outdated weights belong to."""
    allow_unrelated: bool = False
    """Use weights whose base is no recorded ancestor of `base`; the manifest says so."""

    @classmethod
    def reader(cls) -> str:
        """`method` and its name."""
        return f"method {cls.name()}"

    @classmethod
    def name(cls) -> str:
        """The method's name, as its annotation `Literal["name"]` has it."""
        (name,) = get_args(cls.model_fields["method"].annotation)
        return name

    def rate(self) -> float | None:
        """The dropout of the student; None is the base's own."""
        return None

    def require(self, scene: Scene) -> None:
        """InputError for what the method cannot use, before anything is read."""
        self.require_kind(scene.kind)

    def require_kind(self, kind: TaskKind) -> None:
        """InputError for settings that mean nothing in tasks of this kind; all that a plan knows of a task."""

    @abstractmethod
    def student(self, scene: Scene) -> nn.Module:
        """The model of the new base, unread, where it starts."""

    def told(self, scene: Scene) -> dict[str, Any]:
        """What the manifest says of the start."""
        return {}
