"""`recyclable probe`: is it worth recycling? A verdict and its evidence, without any training."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from recyclable import models
from recyclable.analysis.distance import Weights, distance
from recyclable.analysis.lora_difference import LoraDifference
from recyclable.analysis.verdict import Features, Verdict, judge
from recyclable.config import Settings
from recyclable.errors import InputError
from recyclable.training import distributed, rundir
from recyclable.weights.adapted import ADAPTER, ADAPTER_CONFIG, AdaptedWeights
from recyclable.weights.base import Base
from recyclable.weights.differences import Aligned
from recyclable.weights.files import write_json
from recyclable.weights.fingerprint import tokenizer_digest
from recyclable.weights.lineage import read_lineage
from recyclable.weights.provenance import claimed_relation, refuse_early, require_descendant, verified
from recyclable.weights.store import find
from recyclable.weights.strict_json import read_json
from recyclable.weights.vocabulary import align, vocabulary_tensors

RESULT, PAGE = "probe.json", "report.html"


class ProbeConfig(Settings):
    """`recyclable probe`: weights + a new base (+ a task) -> is it worth recycling?"""

    weights: str
    """Adapted weights: a directory, or a name in the store."""
    base: str
    """The new base."""
    old_base: str | None = None
    """The base that the weights belong to; null: found by the names in manifest and lineage."""
    task: str | None = None
    """Null: only weights are looked at."""
    to: str | None = None
    """Weights of the same kind tuned on the new base: the path then leads to them, not to the weights unchanged."""
    store: str | None = None
    allow_unrelated: bool = False
    """Try them on a base that is no recorded descendant of their own."""
    examples: int = Field(300, gt=0)
    """Of dev, a fixed random subset."""
    points: int = Field(11, ge=2)
    """Of the path; the paper has 26."""
    out: Path | None = None
    """Where the report goes, and finished points, so that a killed probe goes on; null: nowhere."""


def probe(config: ProbeConfig, resume: bool = False) -> tuple[dict[str, Any], Verdict]:
    """What the JSON of a probe says, and its verdict with the reason; a collective of all ranks.

    Nothing is trained. Each weight file is read once, hashed on the way, before any forward pass.

    Raises InputError.
    """
    new, team = Base(models.locate(config.base)), distributed.Ranks()
    weights = AdaptedWeights(find(config.weights, config.store), verify=False)
    relation = require_descendant(weights, new, True)[1] if config.allow_unrelated else claimed_relation(weights, new)
    own = relation == "own"
    old = new if own else _old_base(weights, new, config.old_base)
    trial = None
    if config.task is not None:
        from recyclable.recipes.probe_task import prepare  # which takes a while to import

        trial = prepare(config, weights, old, new, own)
    elif config.to is not None:
        raise InputError("to", f"is {config.to!r}, but there is no task to walk the path with")
    evidence: dict[str, Any] = {"distance": movement(weights, old, new)}
    verified(weights, old, new, config.allow_unrelated, team)
    if config.out is not None and not rundir.claim(config, RESULT, resume):
        result = read_json(config.out / RESULT)
        return result, Verdict(result["verdict"], result.get("expected_gain"), result.get("confidence"))
    features = Features(own)
    if trial is not None:
        features = trial.run(evidence, config.out, team)
    verdict = judge(features)
    result = {"verdict": verdict.method, "confidence": verdict.confidence, "expected_gain": verdict.gain}
    result = {name: value for name, value in result.items() if value is not None} | {"evidence": evidence}
    if config.out is not None:
        result["report"] = str(config.out / PAGE)
        if distributed.is_main():
            _report(result, verdict, config, weights)
        distributed.barrier()
    return result, verdict


def movement(weights: AdaptedWeights, old: Base, new: Base) -> dict[str, Any]:
    """How far the upgrade moved each layer, beside how far tuning had; a collective (`analysis.distance.distance`).

    Embeddings of two vocabularies are compared over the tokens that both have. Tuning is a delta's or a plain LoRA's.
    """
    first: Weights = old.hashed
    second: Weights = new.hashed
    tuning = _tuning(weights, old)
    if tokenizer_digest(old) != tokenizer_digest(new):
        names, rows = vocabulary_tensors(old) & vocabulary_tensors(new), align(old, new).old_row
        both = np.flatnonzero(rows >= 0)
        first, second = Aligned(first, names, rows[both]), Aligned(second, names, both)
        tuning = tuning and Aligned(tuning, names, rows[both])
    return distance(first, second, tuning, distributed.Ranks())


def _tuning(weights: AdaptedWeights, old: Base) -> Weights | None:
    """The difference that tuning made to the base's tensors; None for an adapter that is no such thing."""
    if not weights.is_adapter:
        return weights.delta
    adapter, config = weights.file(ADAPTER), read_json(weights.folder / ADAPTER_CONFIG)
    if not LoraDifference.is_plain(adapter, config):
        return None
    return LoraDifference(adapter, {n: models.adapter_base_name(n, old) for n in adapter.names}, config)


def _old_base(weights: AdaptedWeights, new: Base, named: str | None) -> Base:
    """The base that the weights were tuned on: as named, or by the names that manifest and lineage have for it."""
    if named is not None:
        old = Base(models.locate(named))
        refuse_early(weights, old)
        return old
    tried = list(dict.fromkeys(_names_of_old_base(weights, new)))
    for name in tried:
        try:
            old = Base(models.locate(name))
            refuse_early(weights, old)
        except InputError:
            continue
        return old
    raise InputError(
        weights.folder, f"its base is not at {' or '.join(tried)} any more: say where it is with --old-base"
    )


def _names_of_old_base(weights: AdaptedWeights, new: Base) -> Iterator[str]:
    recorded = weights.manifest.base
    yield recorded["name"]
    for ancestor in (read_lineage(new.folder) or {"ancestors": []})["ancestors"]:
        if ancestor["fingerprint"]["weights"] == recorded["fingerprint"]["weights"]:
            yield ancestor["name"]


def _report(result: dict[str, Any], verdict: Verdict, config: ProbeConfig, weights: AdaptedWeights) -> None:
    """The page, TensorBoard's scalars, and last the JSON, which marks the probe as finished."""
    from recyclable.report.probe_page import write_page, write_scalars

    task = weights.manifest.task["name"] if config.task is None else Path(config.task).name
    names = {"weights": config.weights, "new base": config.base, "task": task}
    write_page(result, verdict.reason, names, config.out / PAGE)
    write_scalars(result["evidence"], config.out / "tensorboard")
    write_json(config.out / RESULT, result)
