"""Which weights tuning trains: one file per kind, found by name (`tuning` in tune.yaml)."""

from __future__ import annotations

from recyclable.registry import Registry
from recyclable.tunings.parts.tuning import Tuning

TUNINGS: Registry[Tuning] = Registry("recyclable.tunings", "tuning", lambda: Tuning)
