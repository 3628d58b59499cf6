"""A model card (`README.md`) for what leaves: its base and lineage, how it was made, scores, how to load it.

The front matter is the Hub's: https://huggingface.co/docs/hub/model-cards#model-card-metadata.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from transformers import PretrainedConfig

from recyclable.architectures.pooling import class_for

FILE = "README.md"
_TAGS = {
    "CausalLM": "text-generation",
    "Seq2SeqLM": "text2text-generation",
    "MaskedLM": "fill-mask",
    "SequenceClassification": "text-classification",
    "TokenClassification": "token-classification",
    "QuestionAnswering": "question-answering",
}
"""transformers' AutoModelFor... -> what the Hub calls its task."""
_SHOWN = 12
"""Characters of a digest, as everywhere else."""
_MAX_LABELS = 20


@dataclass(frozen=True)
class Card:
    """What a card says; names and values may be a stranger's, and are one line each in it."""

    title: str
    about: str
    """A sentence on what it is."""
    base: Mapping[str, Any]
    """Name, fingerprint and recorded ancestors (nearest first) of the base it is made from, as manifests have them."""
    relation: str
    """To that base, as the Hub calls it: finetune, adapter or merge."""
    config: PretrainedConfig
    architecture: str
    """The class in transformers."""
    tags: Sequence[str] = ()
    rows: Mapping[str, Any] = field(default_factory=dict)
    """How it was made, a line each; what is None or empty is left out."""
    scores: Mapping[str, float | None] = field(default_factory=dict)
    labels: int = 0
    """How many the head of an adapter is for."""
    before: Sequence[str] = ()
    """Lines of Python without which it does not load."""


def write_card(card: Card, into: Path) -> None:
    """Write it into a directory."""
    (into / FILE).write_text(text(card), encoding="utf-8")


def text(card: Card) -> str:
    """The whole card, in Markdown."""
    auto = _auto_name(card.config, card.architecture)
    front = {
        "base_model": card.base["name"],
        "base_model_relation": card.relation,
        "library_name": "peft" if card.relation == "adapter" else "transformers",
        "pipeline_tag": _TAGS.get(auto),
        "tags": ["recyclable", *dict.fromkeys(card.tags)],
    }
    head = yaml.safe_dump({name: value for name, value in front.items() if value}, sort_keys=False, allow_unicode=True)
    rows = {
        **card.rows,
        **{f"score, {name}": f"{value:.4f}" for name, value in card.scores.items() if value is not None},
    }
    table = [
        f"| {one_line(name)} | {one_line(value)} |" for name, value in rows.items() if value not in (None, "", [], {})
    ]
    parts = [
        f"---\n{head}---",
        f"# {one_line(card.title)}",
        card.about,
        "\n".join(["| | |", "|---|---|", *table]) if table else "",
        "## Where its base comes from",
        "\n".join(_lineage(card.base)),
        "## How to load it",
        "```python\n" + "\n".join(_loading(card, auto)) + "\n```",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def named(base: Mapping[str, Any]) -> str:
    """A base by its name and the beginning of its fingerprint."""
    return f"`{one_line(base['name'])}` ({base['fingerprint']['weights'][:_SHOWN]})"


def tuned_rows(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What adapted weights' manifest says of how they were made."""
    task, tuning, metrics = manifest["task"], dict(manifest["tuning"]), manifest["metrics"]
    settings = ", ".join(f"{name} {value}" for name, value in tuning.items() if name != "tuning" and value is not None)
    labels = ", ".join(task["labels"][:_MAX_LABELS]) + ", ..." * (len(task["labels"]) > _MAX_LABELS)
    origin = manifest["recycled_from"]
    return {
        "task": f"{task['name']} ({task['problem']})",
        "labels": labels,
        "tuning": tuning["tuning"] + (f" ({settings})" if settings else ""),
        "method": manifest["method"],
        "recycled from": f"weights of {named(origin['base'])}" if origin and "base" in origin else None,
        "steps left out as bad": len(metrics.get("skipped_steps", ())) or None,
        "stopped early at step": metrics.get("stopped_early_at"),
        "seconds of training": metrics.get("seconds") or None,
        "tokens that a text is cut at": manifest["settings"]["max_length"],
    }


def tuned_scores(manifest: Mapping[str, Any]) -> dict[str, float | None]:
    """The scores in adapted weights' manifest, by split and name."""
    splits = {split: manifest["metrics"].get(split) or {} for split in ("dev", "test")}
    return {f"{split} {name}": value for split, found in splits.items() for name, value in found.items()}


def _lineage(base: Mapping[str, Any]) -> list[str]:
    """A line per base, the nearest first."""
    line = [base, *base.get("ancestors", ())]
    claimed = ["", *(", by its user's claim" * bool(each.get("declared")) for each in line[1:])]
    return [f"- {named(each)}{claim}" for each, claim in zip(line, claimed, strict=True)]


def _auto_name(config: PretrainedConfig, architecture: str) -> str:
    """What follows AutoModelFor in the class of transformers that makes the architecture; empty for AutoModel."""
    return next((name for name in _TAGS if getattr(class_for(config, name), "__name__", "") == architecture), "")


def _loading(card: Card, auto: str) -> list[str]:
    name, place = f"AutoModelFor{auto}" if auto else "AutoModel", one_line(card.title)
    imports = f"from transformers import {name}, AutoTokenizer"
    tokenizer = f"tokenizer = AutoTokenizer.from_pretrained({place!r})"
    if card.relation != "adapter":
        return [imports, "", f"model = {name}.from_pretrained({place!r})", tokenizer]
    head = f", num_labels={card.labels}" if card.labels else ""
    base = f"base = {name}.from_pretrained({one_line(card.base['name'])!r}{head})"
    model = f"model = PeftModel.from_pretrained(base, {place!r})"
    return [*card.before, "from peft import PeftModel", imports, "", base, model, tokenizer]


def one_line(value: object) -> str:
    """What a stranger may have written, as one line that ends no cell and no code."""
    said = f"{value:.4g}" if isinstance(value, float) else str(value)
    return " ".join("".join(c if c.isprintable() else " " for c in said).split()).replace("|", "\\|").replace("`", "'")
