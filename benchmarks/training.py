"""Training steps beside HF Trainer with DeepSpeed, adapters stacked, start-up; with a GPU the same there.

    python benchmarks/training.py [--quick] [--json] [--only PART ...] [--pairs N] [--stages N ...]
                                  [--precision P ...] [--ranks N ...] [--smollm2 DIR] [--no-docs]

Parts (`--only`): cpu, stack, startup, gpu. RECYCLABLE_DATA names the folder of models/minilm_l3 and corpora; without
it, and with --quick, models and text are made. Both sides of a comparison train on the same batches with the same
ds_config and take turns: each stands still while the other is measured. Medians of all pairs of turns; see
docs/performance.md, whose tables a run that is not quick writes. The last line with `--json`:
{"cpu": [{"model", "stage", "ranks", "precision", "ours_tokens_per_s", "peer_tokens_per_s", "speedup", "loss_diff",
"ours_peak_mb", "peer_peak_mb", "gemm_share"}], "stack": {"adapters", "speedup", "max_rel_diff"},
"startup": {"first_step_s"}, "gpu": [...]}; what was not asked for, or needs a GPU that is not there, is null.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import stacked_tuning
from training_case import Case, decoder_world, encoder_world, write_batches
from training_hf import peer
from training_ours import ours
from training_startup import first_steps
from training_tables import TABLES, told_of, write_tables
from training_turns import Side, loss_diff

PAIRS = 5
ENCODER = {"rows": 64, "length": 128, "each": 1}
DECODER = {"rows": 8, "length": 128, "each": 1}
QUICK = {"rows": 8, "length": 32, "each": 2}
OF_STACK = ("adapters", "speedup", "max_rel_diff")


def main() -> None:
    """Measure what is asked for, print the tables and, last, one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small made models, one pair, ZeRO-3 and 1")
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS), help="these parts alone")
    parser.add_argument("--pairs", type=int, help=f"of turns and of runs (default {PAIRS}, --quick 1)")
    parser.add_argument("--stages", type=int, nargs="+", choices=range(4), help="ZeRO stages (default all)")
    parser.add_argument("--precision", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--smollm2", type=Path, metavar="DIR", help="as benchmarks/real_decoders.py writes it")
    parser.add_argument("--no-docs", action="store_true", help="leave docs/performance.md alone, as --quick does")
    parser.add_argument("--gpu-on-cpu", action="store_true", help=argparse.SUPPRESS)  # its code with tiny shapes
    arguments = parser.parse_args()
    arguments.pairs = arguments.pairs or (1 if arguments.quick else PAIRS)
    arguments.stages = arguments.stages or ([3] if arguments.quick else [0, 1, 2, 3])
    arguments.environment = dict(os.environ)
    os.environ.update({"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""})  # all parts but the GPU's
    found: dict[str, Any] = dict.fromkeys(PARTS)
    for part in arguments.only:
        with tempfile.TemporaryDirectory() as scratch:
            found[part] = PARTS[part](Path(scratch), arguments)
    for part, what in found.items():
        if what is not None:
            print(TABLES[part](what), flush=True)
    if not (arguments.quick or arguments.no_docs):
        on_gpu = {"gpu": found.pop("gpu")}
        write_tables(found, told_of(f"Medians of {arguments.pairs} pairs"))
        if on_gpu["gpu"]:
            write_tables(on_gpu, told_of(f"{on_gpu['gpu'][0]['device']}, medians of turns of ten steps"))
        found |= on_gpu
    if arguments.json:
        print(json.dumps(as_json(found)))


def as_json(found: dict[str, Any]) -> dict[str, Any]:
    """What the last line says."""
    stack, startup = found["stack"], found["startup"]
    return {
        **found,
        "stack": stack and {key: stack[key] for key in OF_STACK},
        "startup": startup and {"first_step_s": startup["1 rank"]},
    }


def cpu(scratch: Path, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each configuration: all of the encoder, and the decoder at ZeRO-1."""
    rows = []
    for number, case in enumerate(cases(scratch, arguments)):
        rows.append(compare(case, scratch / str(number)))
        print(json.dumps(rows[-1]), flush=True)
    return rows


def cases(scratch: Path, arguments: argparse.Namespace) -> Iterator[Case]:
    """The configurations; a model is written when its first one is asked for."""
    for lm, stages in (("masked", arguments.stages), ("causal", [1])):
        folder = scratch / lm
        folder.mkdir()
        shape = QUICK if arguments.quick else ENCODER if lm == "masked" else DECODER
        if lm == "masked":
            model, corpus = encoder_world(folder, arguments.quick)
        else:
            model, corpus = decoder_world(folder, shape["length"], arguments.quick, arguments.smollm2)
        for precision in arguments.precision:
            for ranks in arguments.ranks:
                for stage in stages:
                    at = {"stage": stage, "ranks": ranks, "precision": precision, "pairs": arguments.pairs}
                    yield Case(model=model, lm=lm, folder=str(folder), corpus=corpus, **shape, **at)


def compare(case: Case, folder: Path) -> dict[str, Any]:
    """Both sides of one configuration, in turns."""
    folder.mkdir()
    write_batches(case, folder)
    sides: dict[str, Side] = {}
    try:
        for name, work in (("ours", ours), ("peer", peer)):
            sides[name] = Side(work, case, folder / name)
        pairs, alone = [], []
        for number in range(case.pairs):
            names = ("ours", "peer") if number % 2 == 0 else ("peer", "ours")
            took = {name: sides[name].turn() / case.each for name in names}
            pairs.append((took["ours"], took["peer"]))
            alone.append(sides["ours"].measured() / took["ours"])
        losses = [sides[name].end() for name in ("ours", "peer")]
        peaks = {f"{name}_peak_mb": side.peak_mb for name, side in sides.items()}
    finally:
        for side in sides.values():
            side.kill()
    return {
        **{"model": case.model, "stage": case.stage, "ranks": case.ranks, "precision": case.precision},
        "ours_tokens_per_s": case.tokens / statistics.median(own for own, _ in pairs),
        "peer_tokens_per_s": case.tokens / statistics.median(other for _, other in pairs),
        "speedup": statistics.median(other / own for own, other in pairs),
        "loss_diff": loss_diff(*losses),
        **peaks,
        "gemm_share": statistics.median(alone),
    }


def stack(scratch: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Several adapters in one run, by benchmarks/stacked_tuning.py."""
    count = 3 if arguments.quick else stacked_tuning.ADAPTERS
    return stacked_tuning.measure(scratch, count, arguments.quick, arguments.pairs)


def gpu(_: Path, arguments: argparse.Namespace) -> list[dict[str, Any]] | None:
    """The GPU's part, in a process that sees it; None without one."""
    command = [sys.executable, str(Path(__file__).with_name("training_gpu.py"))]
    command += ["--quick"] * arguments.quick + ["--cpu"] * arguments.gpu_on_cpu
    done = subprocess.run(command, env=arguments.environment, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def startup(scratch: Path, arguments: argparse.Namespace) -> dict[str, float]:
    """Median seconds to the first step, by ranks."""
    return first_steps(scratch, arguments.pairs)


PARTS: dict[str, Callable[[Path, argparse.Namespace], Any]] = {
    **{"cpu": cpu, "stack": stack, "startup": startup, "gpu": gpu},
}

if __name__ == "__main__":
    main()
