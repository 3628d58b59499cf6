"""Memory that `recyclable plan` predicts, against what real runs of the same configurations take.

    python benchmarks/plan.py [--quick] [--json] [--only NAME ...] [--calibrate] [--scratch DIR]

Each configuration is a run of `pretrain`, `tune` or `recycle` on ranks, from start to result, on a random model that is
written here. Measured is the largest rank's peak of RssAnon (/proc/self/status, every 2 ms) above the same process with
everything imported and the process group up. Predicted is `recyclable.planning.memory` from the structure alone, and
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
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

from memory import MB, anonymous_bytes, peak
from sharded_start import START, TIMEOUT_S

from recyclable.report.compare import table

WORDS = 5000
"""Words of the tokenizer; a vocabulary may have more rows."""
BERT = {"model_type": "bert", "hidden_size": 512, "num_attention_heads": 8, "intermediate_size": 2048}
ROBERTA = {**BERT, "model_type": "roberta", "hidden_size": 640, "num_attention_heads": 10, "pad_token_id": 1}
LLAMA = {
    "model_type": "llama",
    "hidden_size": 512,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 1536,
}
TIED = {**LLAMA, "tie_word_embeddings": True}
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": str(1 << 16)}
"""glibc keeps freed blocks for later: without this, what was held counts as if it were."""


@dataclass(frozen=True)
class Configuration:
    """One run.

    Args:
        model: fields of its config.
        run: settings of run.yaml beside those that all runs have.
        zero: `zero_optimization` of the ds_config.
        machine: what else its ds_config has.
    """

    name: str
    verb: str
    model: dict[str, Any]
    run: dict[str, Any] = field(default_factory=dict)
    zero: dict[str, Any] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)
    ranks: int = 1


def _bert(layers: int, vocabulary: int, **more: Any) -> dict[str, Any]:
    return {**BERT, "num_hidden_layers": layers, "vocab_size": vocabulary, **more}


def _llama(layers: int, vocabulary: int, **more: Any) -> dict[str, Any]:
    return {**LLAMA, "num_hidden_layers": layers, "vocab_size": vocabulary, **more}


BF16 = {"bf16": {"enabled": True}}
SHAPE = {"max_length": 64, "train_batch_size": 8}
LONG = {"max_length": 128, "train_batch_size": 8}
NOTHING_KEPT = {
    "stage": 3,
    "stage3_param_persistence_threshold": 0,
    "stage3_max_live_parameters": 0,
    "stage3_prefetch_bucket_size": 0,
    "stage3_max_reuse_distance": 0,
}
OFFLOAD = {"device": "cpu"}
SMALL_BUCKETS = {"reduce_bucket_size": 5_000_000, "allgather_bucket_size": 5_000_000}
TWELVE = (
    Configuration("encoder, ZeRO-0", "pretrain", _bert(12, 30522), LONG, {"stage": 0}),
    Configuration(
        "encoder, ZeRO-1, 2 ranks", "pretrain", _bert(10, 30522), SHAPE, {"stage": 1, **SMALL_BUCKETS}, {}, 2
    ),
    Configuration(
        "encoder's task, ZeRO-2", "tune", {**ROBERTA, "num_hidden_layers": 8, "vocab_size": 50265}, LONG, {"stage": 2}
    ),
    Configuration(
        "decoder, ZeRO-2, 2 ranks", "pretrain", _llama(10, 32000), LONG, {"stage": 2, **SMALL_BUCKETS}, {}, 2
    ),
    Configuration("decoder, ZeRO-2, bf16", "pretrain", _llama(14, 32000), LONG, {"stage": 2}, BF16),
    Configuration(
        "decoder, ZeRO-3, 2 ranks",
        "pretrain",
        {**TIED, "num_hidden_layers": 10, "vocab_size": 60000},
        LONG,
        {"stage": 3, **SMALL_BUCKETS},
        {},
        2,
    ),
    Configuration(
        "decoder, ZeRO-3, bf16, 2 ranks, layer by layer", "pretrain", _llama(16, 32000), LONG, NOTHING_KEPT, BF16, 2
    ),
    Configuration(
        "LoRA on a decoder, ZeRO-1, bf16",
        "tune",
        _llama(20, 32000, hidden_size=768, intermediate_size=2048, num_attention_heads=12),
        {**LONG, "tuning": "lora"},
        {"stage": 1},
        BF16,
    ),
    Configuration(
        "online teacher, decoder, ZeRO-2", "pretrain", _llama(8, 32000), {**LONG, "teacher": "base"}, {"stage": 2}
    ),
    Configuration(
        "optimizer on the CPU, ZeRO-2, bf16",
        "pretrain",
        _llama(12, 32000),
        SHAPE,
        {"stage": 2, "offload_optimizer": OFFLOAD},
        BF16,
    ),
    Configuration(
        "optimizer and parameters on the CPU, ZeRO-3, bf16, 2 ranks",
        "pretrain",
        _llama(14, 32000),
        SHAPE,
        {"stage": 3, "offload_optimizer": OFFLOAD, "offload_param": OFFLOAD},
        BF16,
        2,
    ),
    Configuration(
        "262k tokens, decoder, ZeRO-1",
        "pretrain",
        _llama(6, 262144, hidden_size=256, intermediate_size=1024, num_attention_heads=4, tie_word_embeddings=True),
        {"max_length": 96, "train_batch_size": 8},
        {"stage": 1},
    ),
)
SHORT = {"max_length": 48, "train_batch_size": 8}
CALIBRATION = (
    Configuration("c0 decoder 0", "pretrain", _llama(6, 20000), SHORT, {"stage": 0}),
    Configuration("c0b decoder 0 bf16", "pretrain", _llama(6, 20000), SHORT, {"stage": 0}, BF16),
    Configuration("c1 encoder 1", "pretrain", _bert(6, 20000), SHORT, {"stage": 1}),
    Configuration("c2 encoder 2 r2", "pretrain", _bert(6, 20000), SHORT, {"stage": 2}, {}, 2),
    Configuration("c2b decoder 2 bf16 r2", "pretrain", _llama(8, 20000), SHORT, {"stage": 2}, BF16, 2),
    Configuration("c3 decoder 3", "pretrain", _llama(8, 20000), SHORT, {"stage": 3}),
    Configuration("c3b encoder 3 bf16 r2", "pretrain", _bert(8, 20000), SHORT, {"stage": 3}, BF16, 2),
    Configuration("c4 acts", "pretrain", _bert(6, 5000), {"max_length": 256, "train_batch_size": 24}, {"stage": 2}),
    Configuration("c5 lora", "tune", _bert(12, 20000), {**SHAPE, "tuning": "lora"}, {"stage": 2}),
    Configuration("c6 off2", "pretrain", _bert(8, 20000), SHORT, {"stage": 2, "offload_optimizer": OFFLOAD}, {}),
    Configuration(
        "c7 off3",
        "pretrain",
        _bert(8, 20000),
        SHORT,
        {"stage": 3, "offload_optimizer": OFFLOAD, "offload_param": OFFLOAD},
        {},
        2,
    ),
    Configuration("c8 teacher 3 r2", "pretrain", _bert(6, 20000), {**SHORT, "teacher": "base"}, {"stage": 3}, {}, 2),
    Configuration(
        "c9 vocab 1",
        "pretrain",
        _llama(2, 150000, hidden_size=256, tie_word_embeddings=True),
        SHORT,
        {"stage": 2},
        BF16,
    ),
)
QUICK = ("encoder, ZeRO-1, 2 ranks", "optimizer on the CPU, ZeRO-2, bf16")


def main() -> None:
    """Predict and measure; print a table and, last, one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"only {' and '.join(QUICK)}")
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    parser.add_argument("--only", nargs="*", help="only configurations whose names begin so")
    parser.add_argument("--calibrate", action="store_true", help="the runs that constants were fitted to instead")
    parser.add_argument("--scratch", type=Path, help="where models are written (default: the temporary directory)")
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)  # what a rank is told
    parser.add_argument("--predict", action="store_true", help=argparse.SUPPRESS)
    arguments, _ = parser.parse_known_args()  # the launcher adds its own
    if arguments.run:
        (predict if arguments.predict else rank)(arguments.run)
        return
    chosen = CALIBRATION if arguments.calibrate else TWELVE
    if arguments.quick:
        chosen = tuple(one for one in chosen if one.name in QUICK)
    if arguments.only:
        chosen = tuple(one for one in chosen if one.name.startswith(tuple(arguments.only)))
    rows = []
    for one in chosen:
        with tempfile.TemporaryDirectory(dir=arguments.scratch) as folder:
            rows.append(compare(one, Path(folder)))
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
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


def compare(one: Configuration, folder: Path) -> dict[str, Any]:
    """Predict a configuration, then run it."""
    make_base(folder / "base", one.model)
    make_texts(folder, one.run["max_length"], one.run["train_batch_size"])
    (folder / "configuration.json").write_text(json.dumps(asdict(one)))
    told = _started(folder, 1, "--predict")[0]
    measured = max(row["peak_mb"] for row in _started(folder, one.ranks))
    return {
        "name": one.name,
        "predicted_mb": told["predicted_mb"],
        "measured_mb": measured,
        "error": told["predicted_mb"] / measured - 1,
        "deepspeed_mb": told["deepspeed_mb"],
        **{name: told[name] for name in ("phase", *(name for name in told if name.endswith("_part")))},
    }


def _started(folder: Path, ranks: int, *options: str) -> list[dict[str, Any]]:
    """What each rank wrote."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **GIVE_BACK}
    command = [sys.executable, "-c", START.format(ranks), __file__, "--run", str(folder), *options]
    subprocess.run(command, env=environment, check=True, timeout=TIMEOUT_S, stdout=sys.stderr)
    return [json.loads((folder / f"rank-{number}.json").read_text()) for number in range(ranks)]


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


def _settings(folder: Path) -> tuple[Configuration, Any, dict[str, Any]]:
    """The configuration with its run config and its ds_config, as a verb reads them."""
    from importlib import import_module

    one = Configuration(**json.loads((folder / "configuration.json").read_text()))
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


def rank(folder: Path) -> None:
    """Run the configuration; write what it took to rank-<rank>.json."""
    from importlib import import_module

    import torch

    from recyclable import distributed

    one, settings, ds_config = _settings(folder)
    recipe = getattr(import_module(f"recyclable.recipes.{one.verb}"), one.verb)  # its imports belong to the baseline
    distributed.init()
    torch.set_num_threads(1)
    distributed.barrier()
    baseline = anonymous_bytes()
    with peak() as most:
        recipe(settings, ds_config)
    row = {"peak_mb": (most[0] - baseline) / MB}
    (folder / f"rank-{distributed.rank()}.json").write_text(json.dumps(row))
    distributed.shutdown()


class _Captured(Exception):
    """Carries what a run would have trained."""


def predict(folder: Path) -> None:
    """Predict the configuration; write it to rank-0.json. The run's own code builds its objective, and stops there."""
    from importlib import import_module

    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

    from recyclable import distributed
    from recyclable.objectives.objective import Objective
    from recyclable.planning.memory import PARTS, memory
    from recyclable.training import zero

    one, settings, ds_config = _settings(folder)
    recipe = import_module(f"recyclable.recipes.{one.verb}")
    distributed.init()

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
    (folder / "rank-0.json").write_text(json.dumps(row))
    distributed.shutdown()


if __name__ == "__main__":
    main()
