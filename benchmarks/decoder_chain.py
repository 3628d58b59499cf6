"""A real decoder once through everything: pretrain, tune, apply, recycle, evaluate; a few steps each.

    python benchmarks/decoder_chain.py --base bases/gemma3 --task tasks/film --out runs/gemma3 [--data DIR] [--json]

`--base` as benchmarks/real_decoders.py writes it, `--task` as benchmarks/decoder_tasks.py does; `--data` (or the
variable RECYCLABLE_DATA) names a directory with `corpora/{bio,general}/{train,heldout}.jsonl.gz`. It shows that the
verbs take the model, with what each takes of time and memory; so few steps say nothing about methods.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from recyclable.report.compare import table
from recyclable.weights.lineage import read_lineage
from recyclable.weights.manifest import read_manifest

TRAIN = {
    "max_length": 64,
    "train_batch_size": 4,
    "warmup_steps": 2,
    "attn_implementation": "eager",
    "eval_batch_size": 4,
    "save_every": 0,
}
"""Of every run that trains."""


def main() -> None:
    """Run what is not finished, and tell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, metavar="DIR")
    parser.add_argument("--task", required=True, metavar="DIR")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--data", type=Path, metavar="DIR", default=os.environ.get("RECYCLABLE_DATA"))
    parser.add_argument("--steps", type=int, default=8, help="of each run (default 8)")
    parser.add_argument("--deepspeed_config", default="cpu_bf16")
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    arguments = parser.parse_args()
    if arguments.data is None:
        parser.error("name the data with --data or RECYCLABLE_DATA")
    rows = chain(arguments)
    print(table(rows, list(dict.fromkeys(name for row in rows for name in row))))
    if arguments.json:
        print(json.dumps({"steps": rows}))


def chain(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """A row per verb: seconds, GB at most, and what it says of the result."""
    out, corpora = arguments.out, Path(arguments.data) / "corpora"
    bio, general = (
        {split: str(corpora / name / f"{split}.jsonl.gz") for split in ("train", "heldout")}
        for name in ("bio", "general")
    )
    train = {**TRAIN, "max_steps": arguments.steps, "eval_every": arguments.steps}
    task = {"task": arguments.task, "max_dev_examples": 16, "max_test_examples": 32, "eval_batch_size": 4}
    upgraded, tuned, replay = out / "upgraded", out / "tuned", {"corpus": general, "share": 0.25}
    outdated = {"base": str(upgraded), "old_base": arguments.base, "weights": str(tuned)}
    text = {"corpus": bio, "replay": replay, "max_heldout_sequences": 8, "learning_rate": 1e-5}
    runs = {
        "upgraded": ("pretrain", {**train, "base": arguments.base, **text}),
        "tuned": ("tune", {**train, **task, "base": arguments.base, "learning_rate": 2e-5}),
        "applied": ("recycle", {**task, **outdated, "method": "apply"}),
        "recycled": ("recycle", {**train, **task, **outdated, "method": "init", "learning_rate": 2e-5}),
    }
    rows = []
    for name, (verb, settings) in runs.items():
        cost = run(verb, {**settings, "out": str(out / name)}, out / f"{name}.yaml", arguments.deepspeed_config)
        rows.append({"run": name, "verb": verb, **cost, **said(out / name)})
    return rows


def run(verb: str, settings: dict[str, Any], file: Path, ds_config: str) -> dict[str, float]:
    """Run a verb in a process of its own, unless it is finished; its seconds, and the most memory it had."""
    told = file.with_suffix(".cost.json")
    if told.is_file():
        return json.loads(told.read_text())
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(settings))  # JSON is YAML
    command = [sys.executable, "-m", "recyclable.cli", verb, str(file), "--deepspeed_config", ds_config]
    start = time.monotonic()
    process = subprocess.Popen(command, stdout=sys.stderr)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"recyclable {verb} {file} ended with {os.waitstatus_to_exitcode(status)}")
    most = usage.ru_maxrss / 2**20
    cost = {"seconds": round(time.monotonic() - start), "GB": round(most, 1)}
    told.write_text(json.dumps(cost))
    return cost


def said(folder: Path) -> dict[str, float]:
    """Losses of an upgraded base before and after, or scores of adapted weights on test."""
    if lineage := read_lineage(folder):
        pairs = (("new text", "heldout"), ("old text", "heldout_replay"))
        return {f"{text}, {when}": lineage[key][when]["loss"] for text, key in pairs for when in ("before", "after")}
    return {f"test {name}": value for name, value in read_manifest(folder).metrics["test"].items()}


if __name__ == "__main__":
    main()
