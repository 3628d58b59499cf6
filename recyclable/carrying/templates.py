"""Told and recorded, never refused: the base that weights go onto writes conversations otherwise than their own did."""

from __future__ import annotations

from typing import Any

from recyclable import distributed
from recyclable.carrying.carried import Carried
from recyclable.weights.chat_template import chat_template_digest
from recyclable.weights.fingerprint import UNKNOWN


def told_template(carried: Carried) -> dict[str, Any]:
    """What a record has under `chat_template` where the bases differ in it, which a line tells; else nothing.

    `old` and `new` are digests (None: no template), `used` is whose template makes texts for the weights on the new
    base: their own `weights`' where they brought a tokenizer along, else the new `base`'s.
    """
    old, new = _of_old(carried), chat_template_digest(carried.new.folder)
    if old in (new, UNKNOWN):
        return {}
    used = "base" if carried.weights.tokenizer is None else "weights"
    theirs = carried.weights.manifest.base["name"]
    differs = f"{theirs} {_said(old)}, {carried.new.folder} {_said(new)}"
    whose = {"base": "the new base's is used", "weights": "the weights' own is used, with their tokenizer"}[used]
    distributed.say(f"notice: {carried.weights.folder}: another chat template: {differs}; {whose}")
    return {"chat_template": {"old": old, "new": new, "used": used}}


def _of_old(carried: Carried) -> str | None:
    """As the manifest recorded it; of an older manifest as the old base has it, where that is open."""
    recorded = carried.weights.manifest.base["fingerprint"].get("chat_template", UNKNOWN)
    opened = vars(carried).get("old")
    return chat_template_digest(opened.folder) if recorded == UNKNOWN and opened is not None else recorded


def _said(digest: str | None) -> str:
    return "has none" if digest is None else f"has {digest[:12]}"
