"""What a model card says of weights on a base, and of an upgraded base."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PretrainedConfig

from recyclable.carrying.carried import Carried
from recyclable.report.model_card import Card, named, one_line, tuned_rows, tuned_scores
from recyclable.weights.manifest import ADAPTER_CONFIG, Manifest
from recyclable.weights.strict_json import read_json

_HOW = {
    "own": "that very base",
    "recorded": "a descendant of it by its recorded lineage",
    "declared": "a descendant of it by a user's claim",
    "unrelated": "which does not descend from it",
}
"""Relation of the base that weights are on to their own -> what is said of it."""
_OF_NO_PEFT = ["import recyclable.adapters.bottleneck  # which registers the kind of adapter"]
_UNCHANGED = (None, False, 1.0)


def card_of_weights(
    title: str,
    several: Sequence[Carried],
    record: dict[str, Any],
    config: PretrainedConfig,
    architecture: str,
    merged: bool,
) -> Card:
    """Of adapted weights put on a base without training.

    Args:
        record: what `recycled.json` says.
        config: of the tuned model; `architecture` its class in transformers.
        merged: a model of its own and no adapter.
    """
    manifest, base = several[0].weights.manifest, record["base"]
    given = {name: value for name, value in record["settings"].items() if name != "seed"}
    changes = {name: value for name, value in given.items() if value not in _UNCHANGED}
    at_home = [carried.own for carried in several] == [True] and not changes
    scores = tuned_scores(vars(manifest))
    kind = "adapter" if not merged else "merge" if len(several) > 1 else "finetune"
    return Card(
        title=title,
        about=" ".join(_told(carried, base) for carried in several),
        base=base,
        relation=kind,
        config=config,
        architecture=architecture,
        tags=[manifest.task["problem"], manifest.tuning["tuning"]],
        rows={
            **tuned_rows(vars(manifest)),
            "differences": ", ".join(f"{name} {value}" for name, value in changes.items()),
            "chat template": _template(manifest, record),
        },
        scores=scores if at_home else {f"{name}, on {manifest.base['name']}": value for name, value in scores.items()},
        labels=len(manifest.task["labels"]),
        before=_OF_NO_PEFT if not merged and _kind_of_adapter(several[0]) == "BOTTLENECK" else (),
    )


def card_of_upgrade(title: str, record: dict[str, Any], config: PretrainedConfig, architecture: str) -> Card:
    """Of a base that was trained further, from its lineage."""
    parent, *others = record["ancestors"]
    base = {**parent, "ancestors": others}
    corpus, replay = record["corpus"], record.get("replay")
    heldout = {"held-out": record["heldout"], "held-out old text": record.get("heldout_replay", {})}
    return Card(
        title=title,
        about=f"{named(base)}, trained further on more text. Its own fingerprint is "
        f"{record['fingerprint']['weights'][:12]}; weights tuned on its ancestors go onto it by `recyclable`.",
        base=base,
        relation="finetune",
        config=config,
        architecture=architecture,
        tags=["continual-pretraining"],
        rows={
            "corpus": f"{corpus['train']} (digest {corpus['digest'][:12]})",
            "old text": f"{replay['corpus']['train']}, {replay['share']:.0%} of the sequences" if replay else None,
            "new pieces of the vocabulary": _grown(record.get("extend_vocabulary")),
            "tokens": record["tokens"],
            "steps": record["steps"],
            "steps left out as bad": len(record.get("skipped_steps", ())) or None,
            "teacher": named(record["teacher"]) if record["teacher"] else None,
        },
        scores=dict(
            _numbers({f"{of} {when}": scores for of, told in heldout.items() for when, scores in told.items()})
        ),
    )


def _grown(told: dict[str, Any] | None) -> str | None:
    """What a vocabulary grew by."""
    if told is None:
        return None
    before, after = (told["tokens_per_text"][when] for when in ("before", "after"))
    return f"{told['learned']} (ids {told['first']} on), {before:.1f} -> {after:.1f} tokens per text"


def _told(carried: Carried, base: dict[str, Any]) -> str:
    manifest, name = carried.weights.manifest, one_line(carried.weights.folder.name)
    on = _HOW[carried.relation] if carried.own else f"{named(base)}, {_HOW[carried.relation]}"
    return f"`{name}`, tuned on {named(manifest.base)} for the task `{one_line(manifest.task['name'])}`, on {on}."


def _template(manifest: Manifest, record: dict[str, Any]) -> str | None:
    """Whose chat template it has, where its own base had another than the one it is on."""
    changed = record["weights"][0].get("chat_template")
    if changed is None:
        return None
    return "the weights' own" if changed["used"] == "weights" else f"not that of {manifest.base['name']}"


def _kind_of_adapter(carried: Carried) -> str:
    return str(read_json(carried.weights.folder / ADAPTER_CONFIG).get("peft_type"))


def _numbers(told: dict[str, Any], before: str = "") -> list[tuple[str, float]]:
    """Every number in nested dicts, under the names that lead to it."""
    found: list[tuple[str, float]] = []
    for name, value in told.items():
        if isinstance(value, dict):
            found += _numbers(value, f"{before}{name} ")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found.append((f"{before}{name}", value))
    return found
