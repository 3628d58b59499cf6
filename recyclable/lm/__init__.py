"""Kinds of language models: one file per kind, found by name (`lm` in a run config of `pretrain`).

A kind's class is at the same time the run config of `recyclable pretrain`: its fields are all that it reads.
"""

from __future__ import annotations

from recyclable.lm.parts.kind import LMKind
from recyclable.registry import Registry

LM_KINDS: Registry[LMKind] = Registry("recyclable.lm", "lm", lambda: LMKind)
DEFAULT = "masked"
