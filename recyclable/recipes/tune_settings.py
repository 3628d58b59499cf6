"""The run config of `recyclable tune`: training on a task, and the settings of one kind of tuning."""

from __future__ import annotations

from functools import cache
from typing import Any

from recyclable.config.run_file import make_config
from recyclable.config.settings import LearnSettings
from recyclable.tunings import TUNINGS
from recyclable.tunings.parts.tuning import Tuning


class TuneSettings(LearnSettings, Tuning):
    """Base + task -> adapted weights."""

    def described(self) -> dict[str, Any]:
        """What manifests say of the tuning: its kind and that kind's settings."""
        return self.model_dump(include=set(TUNINGS.get(self.tuning).model_fields))


def tune_settings(tuning: Any, where: object | None = None) -> type[TuneSettings]:
    """The settings of `tune` with one kind of tuning; InputError names `where` for an unknown kind."""
    return _with(TUNINGS.get(tuning, where), tuning)


@cache
def _with(kind: type[Tuning], name: str) -> type[TuneSettings]:
    return type(f"Tune{kind.__name__}", (kind, TuneSettings), {"__doc__": kind.__doc__, "purpose": f"tuning {name}"})


def read_tune_settings(content: dict[str, Any], where: object) -> TuneSettings:
    """A run config of `tune`; full fine-tuning where it names no tuning. Raises InputError."""
    return make_config(tune_settings(content.get("tuning") or "full", where), content, where)
