"""A training step's time and memory against model size and text length on this CPU, and the bytes that ranks send.

    python benchmarks/scaling.py [--quick] [--json] [--rounds N] [--only-bytes] [--plot FILE]

Steps are those of `pretrain` on random encoders, fp32, one rank of one thread: four sizes at one length, and
one size at lengths from 128 to 4,096 with as many tokens a step. Rounds go through all of them by turns; of each the
quickest step counts, since whatever else runs on the machine only slows down. CPU seconds, which that hardly
changes, stand beside. Memory is the peak of RssAnon above what the process began with. Time is fitted as a power of
model FLOPs over sizes, and as a + b length over lengths, where b length is what attention's pairs cost.

Bytes are counted, not estimated: every collective of the last of three steps on two ranks, as PyTorch is asked for it,
beside ZeRO's volumes (Rajbhandari et al. 2020, section 7) and those that `recyclable plan` takes DeepSpeed to send. The
last line with `--json`: {"sizes": [{"parameters", "flops", "seconds", "cpu_seconds", "mb"}], "exponent",
"mb_per_million", "lengths": [{"length", "flops", "seconds", "cpu_seconds", "mb"}], "a", "b", "attention": {"of_time",
"of_flops"}, "bytes": [{"name", "sent", "mb", "plan_mb", "theory_mb", "ratio"}]}.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from memory import MB, anonymous_bytes, peak
from plan import GIVE_BACK, _forked, _settings, make_base, make_texts
from plan_configurations import AGAIN, BERT, BF16, LLAMA, NOTHING_KEPT, Configuration
from scaling_bytes import count

from recyclable.report.compare import table

TOKENS, STEPS = 4096, 5
SHAPES = ((128, 2), (192, 4), (256, 6), (384, 8))
"""(width, layers)."""
LENGTHS = (128, 256, 512, 1024, 2048, 4096)
LENGTH = 128
DECODER = {**LLAMA, "hidden_size": 128, "num_attention_heads": 4, "intermediate_size": 256, "num_hidden_layers": 3}
DECODER |= {"num_key_value_heads": 2, "vocab_size": 5000}


def main() -> None:
    """Measure; print tables and, last, one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two sizes, lengths to 512, one round, stages 0 to 3")
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    parser.add_argument("--rounds", type=int, default=3, help="of all sizes and lengths (default: 3)")
    parser.add_argument("--only-bytes", action="store_true", help="leave out time and memory")
    parser.add_argument("--plot", type=Path, help="draw sizes and lengths")
    arguments = parser.parse_args()
    os.environ.update({"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", **GIVE_BACK})
    found: dict[str, Any] = {}
    if not arguments.only_bytes:
        found = _lines(
            SHAPES[:2] if arguments.quick else SHAPES, LENGTHS[:3] if arguments.quick else LENGTHS, arguments
        )
    found["bytes"] = sent(quick=arguments.quick)
    print(table([{name: _told(value) for name, value in row.items()} for row in found["bytes"]]))
    if arguments.json:
        print(json.dumps(found))


def _lines(shapes: Any, lengths: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    sizes = [_encoder(*shape, LENGTH) for shape in shapes]
    long = [_encoder(*SHAPES[1], length) for length in lengths]
    best: dict[str, dict[str, float]] = {}
    for _ in range(1 if arguments.quick else arguments.rounds):
        for one in dict.fromkeys([*sizes, *long]):
            row, known = _measured(one), best.get(one.name)
            best[one.name] = row if known is None else {name: min(value, known[name]) for name, value in row.items()}
    found = fitted([best[one.name] for one in sizes], [best[one.name] for one in long])
    for name in ("sizes", "lengths"):
        rows = [{**row, "flops": f"{row['flops'] / 1e9:.1f}e9"} for row in found[name]]
        print(table(rows), end="\n\n")
    print(f"seconds grow as model FLOPs to the power of {found['exponent']:.2f}")
    print(f"memory: {found['mb_per_million']:.1f} MB a million of parameters")
    print(f"a step of {TOKENS} tokens: {found['a']:.3g} s + {found['b']:.3g} s x length; at {lengths[-1]} pairs take")
    shares = found["attention"]
    print(f"{shares['of_time']:.0%} of the time and {shares['of_flops']:.0%} of the model FLOPs\n")
    if arguments.plot:
        plot(found, arguments.plot)
    return found


class _Case(Configuration):
    def __hash__(self) -> int:
        return hash(self.name)


def _encoder(width: int, layers: int, length: int) -> Configuration:
    shape = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
    model = {**BERT, **shape, "num_attention_heads": width // 64, "vocab_size": 5000, "max_position_embeddings": 4096}
    run = {"max_length": length, "train_batch_size": TOKENS // length, "max_steps": STEPS}
    return _Case(f"{width} x {layers}, {length}", "pretrain", model, run, {"stage": 1})


def _measured(one: Configuration) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "configuration.json").write_text(json.dumps(asdict(one)))
        return _forked(measured, Path(name), one.ranks)[0]


def measured(folder: Path) -> dict[str, float]:
    """On the rank: the quickest step, and the most memory."""
    import deepspeed

    from recyclable.planning.states import Sizes
    from recyclable.recipes.planned import planned
    from recyclable.recipes.pretrain import pretrain
    from recyclable.training.flops import Work, model_flops

    content = json.loads((folder / "configuration.json").read_text())
    make_base(folder / "base", content["model"])
    make_texts(folder, content["run"]["max_length"], content["run"]["train_batch_size"])
    _, settings, ds_config = _settings(folder)
    objective, ends, step = planned(settings).objective, [], deepspeed.DeepSpeedEngine.step

    def noted(engine: Any, *given: Any, **more: Any) -> Any:
        done = step(engine, *given, **more)
        ends.append((time.perf_counter(), time.process_time()))
        return done

    baseline = anonymous_bytes()
    with peak() as most, patch.object(deepspeed.DeepSpeedEngine, "step", noted):
        pretrain(settings, ds_config)
    took = [(after[0] - before[0], after[1] - before[1]) for before, after in itertools.pairwise(ends)]
    work = Work(settings.train_batch_size, TOKENS, settings.mlm_probability * TOKENS)
    return {
        "length": settings.max_length,
        "parameters": sum(Sizes.of(objective).trained.values()),
        "flops": model_flops(objective).of(work),
        "pairs": sum(each.of(work, 0.0) for each in model_flops(objective).attention),
        "seconds": min(wall for wall, _ in took),
        "cpu_seconds": min(cpu for _, cpu in took),
        "mb": (most[0] - baseline) / MB,
    }


def fitted(sizes: list[dict[str, float]], lengths: list[dict[str, float]]) -> dict[str, Any]:
    """Rows, and the lines through them, of CPU seconds."""
    logs = [[np.log(row[key]) for row in sizes] for key in ("flops", "cpu_seconds")]
    memory = np.polyfit([row["parameters"] for row in sizes], [row["mb"] for row in sizes], 1)[0]
    slope, start = np.polyfit([row["length"] for row in lengths], [row["cpu_seconds"] for row in lengths], 1)
    longest = lengths[-1]
    at = slope * longest["length"]
    return {
        "sizes": [{name: row[name] for name in row if name not in ("length", "pairs")} for row in sizes],
        "exponent": float(np.polyfit(*logs, 1)[0]),
        "mb_per_million": float(memory * 1e6),
        "lengths": [{name: row[name] for name in row if name not in ("parameters", "pairs")} for row in lengths],
        "a": float(start),
        "b": float(slope),
        "attention": {"of_time": float(at / (start + at)), "of_flops": longest["pairs"] / longest["flops"]},
    }


def sent(quick: bool) -> list[dict[str, Any]]:
    """What a rank sends in a step, a row for each ds_config."""
    kept = {name: value for name, value in NOTHING_KEPT.items() if name != "stage"}

    def stage(number: int, more: dict[str, Any] | None = None, **zero: Any) -> dict[str, Any]:
        return {"zero_optimization": {"stage": number, **(kept if number == 3 else {}), **zero}, **(more or {})}

    two = {"train_micro_batch_size_per_gpu": 2}
    configs = {f"ZeRO-{number}": stage(number) for number in range(4)}
    if not quick:
        one_by_one = {"use_multi_rank_bucket_allreduce": False}
        configs |= {f"ZeRO-{n}, reduces not joined": stage(n, **one_by_one) for n in (1, 2)}
        configs |= {f"ZeRO-{n}, 2 micro-batches": stage(n, two) for n in range(4)}
        configs |= {f"ZeRO-{n}, bf16": stage(n, BF16) for n in range(4)}
        configs["ZeRO-3, checkpointing"] = stage(3, AGAIN)
        configs["ZeRO-3, small tensors kept"] = {"zero_optimization": {"stage": 3}}
    rows = []
    for row in count(DECODER, configs):
        total, theory = sum(row["sent"].values()), row["theory"]
        said = {"mb": total / MB, "plan_mb": theory["plan"] / MB, "theory_mb": theory["zero"] / MB}
        rows.append({"name": row["name"], "sent": row["sent"], **said, "ratio": total / theory["zero"]})
    return rows


def _told(value: Any) -> Any:
    if isinstance(value, dict):
        return ", ".join(f"{name} {sent / MB:.3f}" for name, sent in value.items())
    return value


def plot(found: dict[str, Any], path: Path) -> None:
    """Seconds and memory against size and length."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    shown = (("sizes", "flops", "cpu_seconds"), ("lengths", "length", "cpu_seconds"), ("lengths", "length", "mb"))
    for axis, (name, x, y) in zip(axes, shown, strict=True):
        axis.plot([row[x] for row in found[name]], [row[y] for row in found[name]], "o")
        axis.set(xlabel=x, ylabel=y)
        axis.grid(alpha=0.3)
    for axis in axes[:1]:
        axis.set(xscale="log", yscale="log", title=f"exponent {found['exponent']:.2f}")
        axis.tick_params(which="minor", labelbottom=False, labelleft=False)
    lengths = np.array([row["length"] for row in found["lengths"]])
    axes[1].plot(lengths, found["a"] + found["b"] * lengths, "-", label="a + b length")
    axes[1].legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
