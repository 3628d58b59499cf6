"""`recyclable quickstart`: the whole story on this machine, as a study that is written, run and shown."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from recyclable.config.run_file import load_config
from recyclable.data.docstrings import write_docstring_world
from recyclable.errors import InputError
from recyclable.output import say
from recyclable.recipes.study import collect
from recyclable.recipes.study_settings import StudySettings
from recyclable.report.compare import COLUMNS, compare, plot, table

METHODS = ("scratch", "init", "distill", "both")
_STUDY = "study.yaml"
_SEED = 0

# Small enough for five minutes on two cores.
_PRETRAIN = {
    "max_steps": 400,
    "train_batch_size": 32,
    "max_length": 64,
    "warmup_steps": 40,
    "max_heldout_sequences": 256,
    "eval_every": 400,
    "save_every": 200,
}
_ADAPT = {"max_length": 64, "save_every": 0}
_TUNE = {
    **_ADAPT,
    "train_batch_size": 32,
    "max_steps": 450,
    "warmup_steps": 45,
    "eval_every": 50,
    "max_dev_examples": 400,
}
_FEW_SHOT = {**_ADAPT, "train_batch_size": 16, "max_steps": 200, "warmup_steps": 20, "eval_every": 10}
# Learning rates for the small base made here, and for a pre-trained one of the user's, which larger ones would wreck.
_RATES = {"pretrain": 3e-3, "tune": 1e-3, "scratch": 2e-3, "init": 3e-4, "distill": 2e-3, "both": 3e-4}
_RATES_OF_GIVEN_BASE = {"pretrain": 2e-4, "tune": 1e-4, "scratch": 1e-4, "init": 5e-5, "distill": 1e-4, "both": 5e-5}
_DISTILLATION = {"alpha": 0.9, "beta": 10.0, "temperature": 4.0}


def quickstart(
    out: Path, base: str | None, corpus: str | None, task: str | None, run_study: Callable[[Path], int]
) -> dict[str, Any] | None:
    """Write the study into `out`, run it, show what came of it; returns what `--json` prints, None if the study failed.

    Args:
        base, corpus, task: the user's own in place of a base made here, the upgrade's text, the task.
        run_study: runs a study file to its end and returns its exit status.
    """
    file = out / _STUDY
    if out.exists() and any(out.iterdir()) and not file.is_file():
        raise InputError("--out", f"{out} is not empty and holds no quickstart")
    content = {**_study(out, base, corpus, task), "out": str(out)}
    if file.is_file() and yaml.safe_load(file.read_text(encoding="utf-8")) != content:
        raise InputError("--out", f"{out} holds a quickstart with other parts; name another directory")
    if not (base and corpus and task):
        say("Collecting documentation strings of the installed libraries: two domains, one task")
        write_docstring_world(out / "data")
    out.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    if run_study(file) != 0:
        return None
    return _show(load_config(StudySettings, file), out)


def _study(out: Path, base: str | None, corpus: str | None, task: str | None) -> dict[str, Any]:
    """The study file: M0 made (or given), upgraded to M1, tuned with all labels, recycled with 32 a class."""
    data, rates = out / "data", _RATES_OF_GIVEN_BASE if base else _RATES
    upgrade = {"train": str(data / "upgrade" / "train.jsonl"), "heldout": str(data / "upgrade" / "heldout.jsonl")}
    general = {"train": str(data / "general" / "train.jsonl"), "heldout": str(data / "general" / "heldout.jsonl")}
    made = {"parent": str(data / "base"), "corpus": general}
    return {
        "bases": {
            "M0": {"path": base} if base else made,
            "M1": {"parent": "M0", "corpus": {"train": corpus} if corpus else upgrade},
        },
        "tasks": {"task": task or str(data / "task")},
        "edges": [{"old": "M0", "new": "M1"}],
        "seeds": [_SEED],
        "pretrain": {**_PRETRAIN, "learning_rate": rates["pretrain"]},
        "tune": {**_TUNE, "learning_rate": rates["tune"]},
        "experiments": {
            "few_shot": {
                "shots": 32,
                "recycle": {**_FEW_SHOT, **_DISTILLATION},
                "methods": {"apply": {}, **{m: {"settings": [{"learning_rate": rates[m]}]} for m in METHODS}},
            }
        },
    }


def _show(config: StudySettings, out: Path) -> dict[str, Any]:
    records = collect(config)
    runs = {record["method"]: record["run"] for record in records if record["experiment"] == "few_shot"}
    teacher = next(record["run"] for record in records if record["method"] == "tune")
    rows = compare(runs)
    few = config.experiments["few_shot"].shots
    say(f"\nRecycled for the upgraded base with {few} labels a class (dev and test {teacher['metrics']['metric']}):\n")
    say(table(rows, COLUMNS))
    score = teacher["metrics"]["test"][teacher["metrics"]["metric"]] if teacher["metrics"]["test"] else None
    if score is not None:
        say(
            f"\nThe old base tuned with all labels scores {score:.3f}; `apply`: its weights on the new base, untrained."
        )
    plot({f"{few} labels a class": {method: [run] for method, run in runs.items()}}, out / "methods.png")
    say(
        f"""
Plot:       {out / "methods.png"}
Curves:     tensorboard --logdir {out}
The study:  {out / _STUDY} says what was run; change it and run `recyclable study` on it
Your own:   recyclable quickstart --out mine --base MODEL --corpus TEXT.jsonl --task DIR"""
    )
    methods = {
        row["method"]: {key: row[key] for key in ("test", "dev_best", "steps_to_target")}
        for row in rows
        if row["method"] in METHODS
    }
    return {"methods": methods, "out": str(out)}
