"""`recyclable probe`: is it worth recycling? A verdict and its evidence, without any training."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from recyclable import distributed
from recyclable.analysis.distance import Weights, distance
from recyclable.analysis.lora_difference import LoraDifference
from recyclable.analysis.verdict import FITTED_ON, Features, Verdict, judge
from recyclable.carrying.carried import Carried
from recyclable.carrying.places import adapter_base_name
from recyclable.carrying.templates import told_template
from recyclable.recipes.probe_settings import ProbeSettings
from recyclable.training import rundir
from recyclable.weights.adapted import AdaptedWeights
from recyclable.weights.base import Base
from recyclable.weights.differences import Aligned
from recyclable.weights.durable import write_json
from recyclable.weights.manifest import ADAPTER, ADAPTER_CONFIG
from recyclable.weights.strict_json import read_json
from recyclable.weights.vocabulary import rows_between, vocabulary_tensors

if TYPE_CHECKING:
    from recyclable.recipes.probe_task import Trial

RESULT, PAGE = "probe.json", "report.html"


def probe(config: ProbeSettings, resume: bool = False) -> tuple[dict[str, Any], Verdict]:
    """What the JSON of a probe says, and its verdict with the reason; a collective of all ranks.

    Nothing is trained. Each weight file is read once, hashed on the way, before any forward pass.

    Raises InputError.
    """
    team = distributed.Ranks()
    carried = Carried.open(
        config.weights, config.old_base, config.base, store=config.store, allow_unrelated=config.allow_unrelated
    )
    trial = None
    if config.task is not None:
        from recyclable.recipes.probe_task import prepare  # which takes a while to import

        trial = prepare(config, config.task, carried)
    evidence: dict[str, Any] = {"distance": movement(carried)}
    carried.verify(team)
    if config.out is None:
        return _tried(config, carried, trial, evidence)
    with rundir.claim(config, config.out, RESULT, resume, progress=("compatibility.json", "base.json")) as unfinished:
        if unfinished:
            return _tried(config, carried, trial, evidence)
    result = read_json(config.out / RESULT)
    return result, Verdict(result["verdict"], result.get("expected_gain"), result.get("confidence"))


def _tried(
    config: ProbeSettings, carried: Carried, trial: Trial | None, evidence: dict[str, Any]
) -> tuple[dict[str, Any], Verdict]:
    """The trial, where there is one, and the verdict; with `out` also the report."""
    team, features = distributed.Ranks(), Features(carried.own)
    if trial is not None:
        features = trial.run(evidence, config.out, team)
    verdict = judge(features)
    result: dict[str, Any] = {
        "verdict": verdict.method,
        "confidence": verdict.confidence,
        "expected_gain": verdict.gain,
    }
    if trial is not None and trial.task.problem != FITTED_ON:
        result["fitted_on"] = FITTED_ON
    result = {name: value for name, value in result.items() if value is not None} | told_template(carried)
    result["evidence"] = evidence
    if config.out is not None:
        result["report"] = str(config.out / PAGE)
        if distributed.is_main():
            _report(result, verdict, config, config.out, carried.weights)
        distributed.barrier()
    return result, verdict


def movement(carried: Carried) -> dict[str, Any]:
    """How far the upgrade moved each layer, beside how far tuning had; a collective (`analysis.distance.distance`).

    Embeddings of two vocabularies are compared over the tokens that both have. Tuning is a delta's or a plain LoRA's.
    """
    old, new = carried.old, carried.new
    first: Weights = old.hashed
    second: Weights = new.hashed
    tuning = _tuning(carried.weights, old)
    if (between := rows_between(old, new)) is not None:
        names, rows = vocabulary_tensors(old) & vocabulary_tensors(new), between.old_row
        both = np.flatnonzero(rows >= 0)
        first, second = Aligned(first, names, rows[both]), Aligned(second, names, both)
        tuning = tuning and Aligned(tuning, names, rows[both])
    return distance(first, second, new.structure.layers, tuning, distributed.Ranks())


def _tuning(weights: AdaptedWeights, old: Base) -> Weights | None:
    """The difference that tuning made to the base's tensors; None for an adapter that is no such thing."""
    if not weights.is_adapter:
        return weights.delta
    adapter, config = weights.file(ADAPTER), read_json(weights.folder / ADAPTER_CONFIG)
    if not LoraDifference.is_plain(adapter, config):
        return None
    return LoraDifference(adapter, {n: adapter_base_name(n, old) for n in adapter.names}, config)


def _report(
    result: dict[str, Any], verdict: Verdict, config: ProbeSettings, out: Path, weights: AdaptedWeights
) -> None:
    """The page, TensorBoard's scalars, and last the JSON, which marks the probe as finished."""
    from recyclable.report.probe_page import write_page, write_scalars

    task = weights.manifest.task["name"] if config.task is None else Path(config.task).name
    names = {"weights": config.weights, "new base": config.base, "task": task}
    write_page(result, verdict.reason, names, out / PAGE)
    write_scalars(result["evidence"], out / "tensorboard")
    write_json(out / RESULT, result, finite=False)  # CKA of what is constant is no number
