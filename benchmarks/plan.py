"""Memory that `recyclable plan` predicts, against what real runs of the same configurations take.

    python benchmarks/plan.py [--quick] [--json] [--only NAME ...] [--calibrate]
                              [--at-once N] [--scratch DIR]

Each configuration (benchmarks/plan_configurations.py) is a run of `pretrain` or `tune` on ranks, from start to result,
on a random model that is written here. Measured is the largest rank's peak of RssAnon (/proc/self/status, every 2 ms)
above the same process with everything imported and the process group up; ranks are forked from one process that has
imported it, which saves minutes. Predicted is `recyclable.planning.memory` from the structure alone, and
DeepSpeed's own figure is its estimator for ZeRO-2 and 3 (`deepspeed_mb` is null at the other stages): weights,
gradients and optimizer of the trained parameters, as it documents. Nothing was fitted to these twelve; what was fitted,
was to the runs of `--calibrate`. The last line with `--json`:
{"configurations": [{"name", "predicted_mb", "measured_mb", "deepspeed_mb"}], "median_error", "worst_error",
"worst_under"}; errors are shares of what was measured, `worst_under` is the largest of those that were too low.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

from forked import start
from memory import MB, anonymous_bytes, peak
from plan_configurations import CALIBRATION, QUICK, TWELVE, Configuration

from recyclable.report.compare import table

TIMEOUT_S = 900
WORDS = 5000
"""Words of the tokenizer; a vocabulary may have more rows."""
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": str(1 << 16)}
"""glibc keeps freed blocks for later: without this, what was held counts as if it were."""


def main() -> None:
    """Predict and measure; print a table and, last, one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"only {' and '.join(QUICK)}")
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    parser.add_argument("--only", nargs="*", help="only configurations whose names begin so")
    parser.add_argument("--calibrate", action="store_true", help="the runs that constants were fitted to instead")
    parser.add_argument("--at-once", type=int, default=1, help="run so many at the same time (default: 1)")
    parser.add_argument("--scratch", type=Path, help="where models are written (default: the temporary directory)")
    arguments = parser.parse_args()
    os.environ.update({"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", **GIVE_BACK})
    chosen = CALIBRATION if arguments.calibrate else TWELVE
    if arguments.quick:
        chosen = tuple(one for one in chosen if one.name in QUICK)
    if arguments.only:
        chosen = tuple(one for one in chosen if one.name.startswith(tuple(arguments.only)))
    with ThreadPoolExecutor(arguments.at_once) as pool:
        running = [pool.submit(compare, one, arguments.scratch) for one in chosen]
        rows = [one.result() for one in running]
    print(table(rows))
    if arguments.json:
        keys = ("name", "predicted_mb", "measured_mb", "deepspeed_mb")
        print(json.dumps({"configurations": [{key: row[key] for key in keys} for row in rows], **errors(rows)}))


def errors(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Shares of what was measured."""
    signed = [row["predicted_mb"] / row["measured_mb"] - 1 for row in rows]
    each = [abs(one) for one in signed]
    under = max(0.0, -min(signed))
    return {"median_error": statistics.median(each), "worst_error": max(each), "worst_under": under}


def compare(one: Configuration, scratch: Path | None) -> dict[str, Any]:
    """Predict a configuration, and run it."""
    with tempfile.TemporaryDirectory(dir=scratch) as name:
        folder = Path(name)
        (folder / "configuration.json").write_text(json.dumps(asdict(one)))
        (told,) = _forked(predict, folder, 1)
        measured = max(_forked(rank, folder, one.ranks))
    row = {
        "name": one.name,
        "predicted_mb": told["predicted_mb"],
        "measured_mb": measured,
        "error": told["predicted_mb"] / measured - 1,
        "deepspeed_mb": told["deepspeed_mb"],
        **{name: told[name] for name in ("phase", *(name for name in told if name.endswith("_part")))},
    }
    print(json.dumps(row), file=sys.stderr, flush=True)
    return row


def _forked(work: Callable[[Path], Any], folder: Path, ranks: int) -> list[Any]:
    """What each rank returns."""
    started = start(_joined, work, folder, ranks=ranks)
    try:
        for process in started:
            process.join(TIMEOUT_S)
            if process.exitcode != 0:
                raise RuntimeError(f"a rank ended with {process.exitcode}")
    finally:
        for process in started:
            process.kill()
    return [json.loads((folder / f"rank-{number}.json").read_text()) for number in range(ranks)]


def _joined(work: Callable[[Path], Any], folder: Path) -> None:
    """What a rank does; writes what comes of it to rank-<rank>.json."""
    from recyclable import distributed

    distributed.init()
    distributed.barrier()
    (folder / f"rank-{distributed.rank()}.json").write_text(json.dumps(work(folder)))
    distributed.shutdown()


def make_base(folder: Path, fields: dict[str, Any]) -> None:
    """A random model with a word-level tokenizer."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoConfig, PreTrainedTokenizerFast

    from recyclable.models.build import auto_class, structure
    from recyclable.weights.files import write_safetensors

    positions = {"max_position_embeddings": 1024}
    config = AutoConfig.for_model(**{**positions, **fields})
    encoder = fields["model_type"] in ("bert", "roberta")
    model = structure(config, auto_class("MaskedLM" if encoder else "CausalLM"))
    parameters = dict(model.named_parameters())
    draw = torch.Generator().manual_seed(0)
    shapes = {name: (torch.float32, tuple(p.shape)) for name, p in parameters.items()}
    folder.mkdir()
    write_safetensors(
        folder / "model.safetensors",
        shapes,
        ((name, torch.empty(shape).normal_(0, 0.02, generator=draw)) for name, (_, shape) in shapes.items()),
    )
    config.save_pretrained(folder)
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    if fields["model_type"] == "roberta":
        specials[:2] = ["[UNK]", "[PAD]"]
    backend = Tokenizer(WordLevel({w: i for i, w in enumerate([*specials, *_words()])}, unk_token="[UNK]"))
    backend.pre_tokenizer = Whitespace()
    named = {"pad_token": "[PAD]", "unk_token": "[UNK]", "eos_token": "[SEP]", "bos_token": "[CLS]"}
    if encoder:
        backend.post_processor = TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
        named = {**named, "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **named).save_pretrained(folder)


def _words() -> list[str]:
    return [f"w{i}" for i in range(WORDS - 5)]


def make_texts(folder: Path, length: int, batch: int) -> None:
    """A corpus, and a task whose texts all fill a row."""
    words = _words()
    rows = [" ".join(words[(7 * row + place) % len(words)] for place in range(length)) for row in range(6 * batch)]
    (folder / "corpus.txt").write_text("\n".join(rows))
    (folder / "heldout.txt").write_text("\n".join(rows[: 2 * batch]))
    (folder / "task").mkdir()
    for split, some in (("train", rows), ("dev", rows[:batch]), ("test", rows[:batch])):
        lines = [json.dumps({"text": text, "label": ("no", "yes")[i % 2]}) + "\n" for i, text in enumerate(some)]
        (folder / "task" / f"{split}.jsonl").write_text("".join(lines))


def _configuration(folder: Path) -> Configuration:
    return Configuration(**json.loads((folder / "configuration.json").read_text()))


def _settings(folder: Path) -> tuple[Configuration, Any, dict[str, Any]]:
    """The configuration with its run config and its ds_config, as a verb reads them."""
    one = _configuration(folder)
    content: dict[str, Any] = {
        "base": str(folder / "base"),
        "out": str(folder / "out"),
        "max_steps": 3 if one.zero["stage"] == 3 else 2,  # ZeRO-3 learns the order of modules first
        "learning_rate": 1e-4,
        "save_every": 0,
        "eval_every": 100,
        "eval_batch_size": max(1, one.run["train_batch_size"] // one.ranks),
        **one.run,
    }
    if one.verb == "pretrain":
        content["corpus"] = {"train": str(folder / "corpus.txt"), "heldout": str(folder / "heldout.txt")}
    else:
        content["task"] = str(folder / "task")
    if content.get("teacher") == "base":
        content["teacher"] = str(folder / "base")
    read = getattr(import_module(f"recyclable.recipes.{one.verb}_settings"), f"read_{one.verb}_settings")
    ds_config = {
        "train_micro_batch_size_per_gpu": one.run["train_batch_size"] // one.ranks,
        "tensorboard": {"enabled": False},
        "zero_optimization": one.zero,
        **one.machine,
    }
    return one, read(content, "benchmark"), ds_config


def rank(folder: Path) -> float:
    """Run the configuration; returns what it took, in MB."""
    one, settings, ds_config = _settings(folder)
    recipe = getattr(import_module(f"recyclable.recipes.{one.verb}"), one.verb)  # its imports belong to the baseline
    baseline = anonymous_bytes()
    with peak() as most:
        recipe(settings, ds_config)
    return (most[0] - baseline) / MB


class _Captured(Exception):
    """Carries what a run would have trained."""


def predict(folder: Path) -> dict[str, Any]:
    """Write the configuration's model and texts, and predict. The run's own code builds its objective, and stops."""
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

    from recyclable.objectives.objective import Objective
    from recyclable.planning.memory import PARTS, memory
    from recyclable.training import zero

    one = _configuration(folder)
    make_base(folder / "base", one.model)
    make_texts(folder, one.run["max_length"], one.run["train_batch_size"])
    one, settings, ds_config = _settings(folder)
    recipe = import_module(f"recyclable.recipes.{one.verb}")

    def captured(objective: Any, examples: Any, *_: Any, **__: Any) -> None:
        raise _Captured(objective, examples)

    reads = zero.materialize

    def read(module: Any, config: dict[str, Any]) -> None:
        if not isinstance(module, Objective):  # the trial of how documents are kept apart
            reads(module, config)

    trains = "recyclable.recipes.pretrain" if one.verb == "pretrain" else "recyclable.recipes.adapting"
    try:
        with patch(f"{trains}.train", captured), patch.object(zero, "materialize", read):
            getattr(recipe, one.verb)(settings, ds_config)
    except _Captured as found:
        objective, examples = found.args
    micro = settings.train_batch_size // one.ranks
    found = memory(
        objective,
        examples.batch([(0, row) for row in range(micro)]),
        ds_config,
        one.ranks,
        on_cpu=True,
        gives_back=True,
        evaluated=examples.batch([(0, row) for row in range(settings.eval_batch_size)]),
    )
    trained = sum(p.numel() for p in objective.parameters() if p.requires_grad)
    largest = max(p.numel() for p in objective.parameters())
    of = {"num_gpus_per_node": one.ranks, "num_nodes": 1}
    offloaded = "offload_optimizer" in one.zero
    theirs = None
    if one.zero["stage"] == 2:
        on_host, on_device = estimate_zero2_model_states_mem_needs(trained, cpu_offload=offloaded, **of)
    elif one.zero["stage"] == 3:
        told = {"cpu_offload": offloaded, "cpu_offload_params": "offload_param" in one.zero, "zero_init": True}
        on_host, on_device, *_ = estimate_zero3_model_states_mem_needs(trained, largest, **told, **of)
    if one.zero["stage"] >= 2:
        theirs = (on_device + (on_host / one.ranks if offloaded else 0)) / MB
    row = {"predicted_mb": found.device / MB, "deepspeed_mb": theirs, "phase": found.phase}
    row |= {f"{part}_part": getattr(found, part) / MB for part in PARTS}
    return row


if __name__ == "__main__":
    main()
