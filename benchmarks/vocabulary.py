"""What a grown vocabulary gives and costs: tokens per text, and the score of weights recycled onto it.

    python benchmarks/vocabulary.py [--quick] [--pieces N] [--steps N] [--init-steps N] [--seeds N] [--out DIR] [--json]

A real encoder (RECYCLABLE_DATA's models/minilm_l3) gets a language-model head on general text. For each seed it is
tuned on ChemProt, and upgraded on biomedical text twice: as it is, and with `extend_vocabulary`. The outdated weights
go onto both upgrades, untrained (`apply`) and trained a little with 32 labels a class (`init`). `score` has accuracies
on the dev and test texts in which no new piece comes up, and `all` on some 1,000 of all, means over the seeds and each
seed's; `kept` is extended over same_vocabulary. --quick does it with a small model made here, on documentation strings.
What is finished in --out is not run again.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from transformers import PreTrainedTokenizerBase

from recyclable.data.corpus import load_corpus
from recyclable.data.docstrings import write_docstring_world
from recyclable.weights.vocabulary import load_tokenizer

SAMPLED = 1000
SAME, GROWN = "same_vocabulary", "extended"
CPU = str(Path(__file__).parents[1] / "ds_configs" / "cpu_autocast.json")
TRAINING = {"warmup_steps": 10, "dropout": 0.0, "attn_implementation": "eager", "save_every": 0, "max_length": 128}
TUNING = {"train_batch_size": 16, "group_by_length": True, "max_dev_examples": 300}


@dataclass(frozen=True)
class World:
    """A base, two domains and a task."""

    base: Path
    task: Path
    domains: dict[str, Path]
    """Name -> a folder with train and heldout; the first is what the base is upgraded on."""


def main() -> None:
    """Measure, print figures or one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small model, made here")
    parser.add_argument("--pieces", type=int, help="how many pieces are learned (default 1000, --quick 100)")
    parser.add_argument("--steps", type=int, help="of each upgrade, 16 x 128 tokens (default 60, --quick 10)")
    parser.add_argument("--tune-steps", type=int, help="of tuning, 16 texts (default 300, --quick 20)")
    parser.add_argument("--init-steps", type=int, help="of recycling with init (default 60, --quick 5; 0: none)")
    parser.add_argument("--seeds", type=int, help="how many (default 4, --quick 1)")
    parser.add_argument("--out", type=Path, help="where runs go (default: a temporary directory)")
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    arguments = parser.parse_args()
    few = {"pieces": 100, "steps": 10, "tune_steps": 20, "init_steps": 5, "seeds": 1}
    usual = few if arguments.quick else {"pieces": 1000, "steps": 60, "tune_steps": 300, "init_steps": 60, "seeds": 4}
    chosen = {name: getattr(arguments, name) for name in usual if getattr(arguments, name) is not None}
    with tempfile.TemporaryDirectory() as scratch:
        out = arguments.out or Path(scratch)
        figures = measure(made_here(out) if arguments.quick else real(), out, **{**usual, **chosen})
    print(json.dumps(figures) if arguments.json else yaml.safe_dump(figures, sort_keys=False))


def real() -> World:
    """From RECYCLABLE_DATA."""
    if not (data := os.environ.get("RECYCLABLE_DATA")):
        sys.exit("RECYCLABLE_DATA names no data: set it, or give --quick")
    domains = {name: Path(data, "corpora", name) for name in ("bio", "general")}
    return World(Path(data, "models", "minilm_l3"), Path(data, "tasks", "chemprot"), domains)


def made_here(out: Path) -> World:
    """From the installed libraries' documentation strings."""
    world = write_docstring_world(out / "world", train=200, dev=60, test=100)
    return World(world.base, world.task, {"upgrade": world.upgrade, "general": world.general})


def measure(
    world: World, out: Path, pieces: int, steps: int, tune_steps: int, init_steps: int, seeds: int
) -> dict[str, Any]:
    """All figures; see the top of the file."""
    new, old = world.domains
    pretraining = {**TRAINING, "max_steps": steps, "eval_every": steps, "learning_rate": 3e-4, "train_batch_size": 16}
    pretraining["max_heldout_sequences"] = 128
    run("pretrain", {**pretraining, **corpus(world, old), "base": str(world.base), "mlm_head_steps": steps}, out / "m0")
    found: dict[str, list[dict[str, float]]] = {}
    for seed in range(20, 20 + seeds):
        here = out / f"seed-{seed}"
        told = {"base": str(out / "m0"), "seed": seed}
        tune = {**TRAINING, **TUNING, **told, "task": str(world.task), "tuning": "full", "eval_every": 50}
        run("tune", {**tune, "max_steps": tune_steps, "learning_rate": 2e-4}, here / "tuned")
        upgrade = {**pretraining, **corpus(world, new), **told}
        run("pretrain", upgrade, here / SAME)
        run("pretrain", {**upgrade, "extend_vocabulary": pieces}, here / GROWN)
        record = json.loads((here / GROWN / "lineage.json").read_text())["extend_vocabulary"]
        tasks = split_task(world.task, load_tokenizer(here / GROWN), record["first"], here / "tasks")
        for name, task in tasks.items():
            of_seed = scores(here, dict.fromkeys((SAME, GROWN), here / "tuned"), task)
            found.setdefault(name or "score", []).append(of_seed)
        if init_steps:
            given = {**TRAINING, **TUNING, "method": "init", "weights": str(here / "tuned"), "old_base": told["base"]}
            given |= {"task": str(world.task), "shots": 32, "max_steps": init_steps, "learning_rate": 2e-5}
            for name in (SAME, GROWN):
                run(
                    "recycle",
                    {**given, "seed": seed, "base": str(here / name), "eval_every": 20},
                    here / f"init-{name}",
                )
            on = {name: here / f"init-{name}" for name in (SAME, GROWN)}
            found.setdefault("init", []).append(scores(here, on, tasks[""]))
    lineages = {name: json.loads((here / name / "lineage.json").read_text()) for name in (SAME, GROWN)}
    before, after = load_tokenizer(out / "m0"), load_tokenizer(here / GROWN)  # the same pieces at every seed
    return {
        "pieces": record["learned"],
        "tokens_per_text": {
            name: {"before": tokens(before, folder), "after": tokens(after, folder)}
            for name, folder in world.domains.items()
        },
        **{name: mean(of_seeds) for name, of_seeds in found.items()},
        "heldout_loss": {name: told["heldout"] for name, told in lineages.items()},
        "steps": {"upgrade": steps, "tune": tune_steps, "init": init_steps},
    }


def corpus(world: World, domain: str) -> dict[str, Any]:
    """A domain's text."""
    return {"corpus": {split: str(file_of(world.domains[domain], split)) for split in ("train", "heldout")}}


def mean(seeds: list[dict[str, float]]) -> dict[str, Any]:
    """Accuracies of all seeds; `kept` is of their means."""
    means = {name: sum(each[name] for each in seeds) / len(seeds) for name in (SAME, GROWN)}
    return {**means, "kept": means[GROWN] / means[SAME], "texts": seeds[0]["texts"], "seeds": seeds}


def run(verb: str, config: dict[str, Any], out: Path) -> None:
    """A verb of the command line with these settings; finished, it is not run again."""
    file = out.with_name(f"{out.name}.yaml")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump({**config, "out": str(out)}))
    resume = ["--resume"] if (out / "run.json").is_file() else []
    call(verb, file, "--deepspeed_config", CPU, *resume)


def call(verb: str, *arguments: object) -> str:
    """What a verb prints last; all of it goes to standard error as well."""
    command = [sys.executable, "-m", "recyclable.cli", verb, *map(str, arguments)]
    told = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    print(told, file=sys.stderr, flush=True)
    return told.strip().rpartition("\n")[2]


def split_task(task: Path, grown: PreTrainedTokenizerBase, first: int, into: Path) -> dict[str, Path]:
    """The task with dev and test as its test: texts without new pieces (under ""), and of all."""
    rows = {split: read(file_of(task, split)) for split in ("train", "dev", "test")}
    every = [*rows["dev"], *rows["test"]]
    ids = grown([row["text"] for row in every], add_special_tokens=False)["input_ids"]
    without = [row for row, each in zip(every, ids, strict=True) if max(each, default=0) < first]
    tasks = {"": without, "all": every[:: max(1, len(every) // SAMPLED)]}
    for name, test in tasks.items():
        folder = into / (name or "without")
        folder.mkdir(parents=True, exist_ok=True)
        for split, content in {**rows, "test": test}.items():
            (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    return {name: into / (name or "without") for name in tasks}


def scores(out: Path, weights: dict[str, Path], task: Path) -> dict[str, Any]:
    """Accuracy on either upgrade, and how much the extended one keeps."""
    found = {}
    for name, folder in weights.items():
        last = call("evaluate", "--weights", folder, "--base", out / name, "--task", task, "--json")
        found[name] = json.loads(last)["runs"][0]["test_accuracy"]
    return {**found, "kept": found[GROWN] / found[SAME], "texts": len(read(file_of(task, "test")))}


def tokens(tokenizer: PreTrainedTokenizerBase, folder: Path) -> float:
    """Per held-out text."""
    texts = list(load_corpus(file_of(folder, "heldout"))["text"])
    return sum(map(len, tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"])) / len(texts)


def file_of(folder: Path, split: str) -> Path:
    """The file of a split."""
    return next(path for path in sorted(folder.iterdir()) if path.name.startswith(f"{split}."))


def read(file: Path) -> list[dict[str, Any]]:
    """Rows of JSON lines."""
    content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    return [json.loads(line) for line in content.splitlines()]


if __name__ == "__main__":
    main()
