"""Weights as data, measured beside the usual ways: apply, sharded start, fingerprint, flipped bits, malformed files.

    python benchmarks/weights.py [--quick] [--json] [--scratch DIR]

`apply`: a base of fp32 and an exact delta become a model, every byte verified and the output synced to the disk. The
usual way is three `from_pretrained`, the sum of their state dicts, `save_pretrained`, and a sync of what it saved; `cat
cp` is `cat base delta > /dev/null` and `cp --reflink=never` of the output with a sync. Each runs in a fresh process,
imports left out, inputs in the page cache, nothing else waiting for the disk; the fastest of several. Seconds of
processors, all threads together, are told beside it: a busy machine hardly stretches these. Figures:
- `speedup`: seconds of the usual way over ours, 1 GB model; `speedup_before_sync`: as if the usual way need not sync;
- `vs_cat_cp`: seconds of cat and cp over ours;
- `peak_mb_above_baseline`: the largest peak of anonymous memory, over all sizes and one huge tensor, above what the
  process held with everything imported.
`sharded_start`: see sharded_start.py. `peak_ratio` is a rank's peak above an empty DeepSpeed process until there is an
optimizer, over 1.3 x model / ranks + 256 MB; `bytes_ratio` is bytes read over the rank's share of base + delta. Of all
ranks the largest. 1 or less, and 1.2 or less, is what is wanted.
`fingerprint`: GB per second of one core (processor time), and that over what BLAKE3 alone makes of bytes in memory.
`flips`, `fuzz`: see store_safety.py.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from big_models import layers_for, make_world
from blake3 import blake3
from memory import in_process
from transformers import BertForSequenceClassification

from recyclable.carrying.changes import FoundChanges
from recyclable.recipes.apply import apply
from recyclable.report.compare import table
from recyclable.weights.base import Base
from recyclable.weights.digest import Digested
from recyclable.weights.manifest import DELTA

TIMED_GB = 1.0
"""Size of the model (10^9 bytes) on which `apply` is timed."""
MODEL = "model.safetensors"


def main() -> None:
    """Measure; print tables, and last, if asked for, one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer sizes, runs and cases, under 3 minutes")
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    parser.add_argument("--scratch", type=Path, help="where models are written (default: the temporary directory)")
    arguments = parser.parse_args()
    import sharded_start
    from store_safety import flips, fuzz

    with tempfile.TemporaryDirectory(dir=arguments.scratch) as folder:
        applied, hashed = measure_apply(Path(folder), arguments.quick)
    print(apply_table(applied), end="\n\n")
    started = sharded_start.measure(arguments.quick, arguments.scratch)
    print(sharded_start.report(started), end="\n\n")
    print("fingerprint: {gb_per_s_core:.2f} GB/s on one core, {vs_hash:.0%} of BLAKE3 alone".format(**hashed))
    flipped, fuzzed = flips(arguments.quick), fuzz(arguments.quick)
    print("flipped bits: {found} of {tried} found".format(**flipped))
    print("malformed files: {clear_errors} of {tried} end in one clear error, {slowest_s} s at most".format(**fuzzed))
    if arguments.json:
        result = {"apply": applied, "sharded_start": {"ranks": started}, "fingerprint": hashed}
        print(json.dumps({**result, "flips": flipped, "fuzz": fuzzed}))


def measure_apply(root: Path, quick: bool) -> tuple[dict[str, Any], dict[str, float]]:
    """Speed of `apply` and of fingerprinting on one model, memory of `apply` on every size and with one huge tensor."""
    sizes = (0.1, TIMED_GB) if quick else (0.25, 0.5, TIMED_GB, 2.0)
    peaks: dict[str, float] = {}
    for gigabytes in sizes:
        folder = make_world(root / "model", layers_for(gigabytes), vocabulary=1000)
        if gigabytes == TIMED_GB:
            ways, hashed = _ways(folder, 2 if quick else 5), measure_hash(Base(folder / "new"))
            peaks[f"{gigabytes} GB"] = ways["apply"]["peak_mb"]
        else:
            peaks[f"{gigabytes} GB"] = in_process(_apply, folder)[1]
        shutil.rmtree(folder)
    rows = 65_536 if quick else 262_144
    folder = make_world(root / "model", layers=1, vocabulary=rows)
    peaks[f"one tensor of {rows * 4096 / 1e9:.2f} GB"] = in_process(_apply, folder)[1]
    shutil.rmtree(folder)
    ours, usual = ways["apply"]["seconds"], ways["usual"]
    figures = {
        "speedup": usual["seconds"] / ours,
        "speedup_before_sync": usual["before_sync_s"] / ours,
        "peak_mb_above_baseline": max(peaks.values()),
        "vs_cat_cp": ways["cat cp"]["seconds"] / ours,
    }
    return {**figures, "ways": ways, "peak_mb": peaks}, hashed


def apply_table(applied: dict[str, Any]) -> str:
    """What `measure_apply` found of `apply`, for people."""
    ways = [{"way": way, **{k: round(v, 2) for k, v in row.items()}} for way, row in applied["ways"].items()]
    peaks = [{"apply on": model, "peak MB above imports": round(mb)} for model, mb in applied["peak_mb"].items()]
    return "\n\n".join(
        (
            f"apply, {TIMED_GB:g} GB, fp32: {applied['speedup']:.1f} times as fast as the usual way "
            f"({applied['speedup_before_sync']:.1f} times if that need not sync), "
            f"{applied['vs_cat_cp']:.0%} of the speed of cat and cp",
            table(ways),
            table(peaks),
        )
    )


def _ways(folder: Path, times: int) -> dict[str, dict[str, float]]:
    """Way -> the least seconds and the largest peak (MB) of several runs; the ways take turns."""
    files = [str(path) for name in ("old", "new", "tuned", "weights") for path in (folder / name).glob("*.safetensors")]
    works = {"apply": _apply, "usual": _usual_way, "cat cp": _cat_and_copy}
    runs: dict[str, list[tuple[dict[str, float], float]]] = {way: [] for way in works}
    for _ in range(times):
        for way, work in works.items():
            subprocess.run(["cat", *files], stdout=subprocess.DEVNULL, check=True)  # into the page cache
            os.sync()
            runs[way].append(in_process(work, folder))
    return {
        way: {
            **{key: min(laps[key] for laps, _ in found) for key in found[0][0]},
            "peak_mb": max(peak for _, peak in found),
        }
        for way, found in runs.items()
    }


def _apply(folder: Path) -> dict[str, float]:
    shutil.rmtree(folder / "out", ignore_errors=True)
    taken = _clock()
    apply([folder / "weights"], folder / "new", folder / "out", FoundChanges())
    return taken()


def _usual_way(folder: Path) -> dict[str, float]:
    shutil.rmtree(folder / "usual", ignore_errors=True)
    taken = _clock()
    old, new, tuned = (BertForSequenceClassification.from_pretrained(folder / name) for name in ("old", "new", "tuned"))
    base, weights = old.state_dict(), tuned.state_dict()
    with torch.no_grad():
        for name, tensor in new.state_dict().items():
            if name.startswith("bert.") and ".pooler." not in name:
                tensor += weights[name] - base[name]
            else:
                tensor.copy_(weights[name])
    new.save_pretrained(folder / "usual")
    before_sync = taken()["seconds"]
    subprocess.run(["sync", folder / "usual" / MODEL], check=True)
    return {**taken(), "before_sync_s": before_sync}


def _cat_and_copy(folder: Path) -> dict[str, float]:
    """What the disk and the kernel alone take."""
    (folder / "copy").unlink(missing_ok=True)
    taken = _clock()
    for command in (
        ["cat", folder / "new" / MODEL, folder / "weights" / DELTA],
        ["cp", "--reflink=never", folder / "out" / MODEL, folder / "copy"],
        ["sync", folder / "copy"],
    ):
        subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    return taken()


def _clock() -> Callable[[], dict[str, float]]:
    """A function that tells the seconds since now, of the wall and of processors, children's included."""
    wall, processors = time.perf_counter(), sum(os.times()[:4])
    return lambda: {"seconds": time.perf_counter() - wall, "cpu_s": sum(os.times()[:4]) - processors}


def measure_hash(base: Base) -> dict[str, float]:
    """GB per processor second of fingerprinting, and over BLAKE3's own speed in memory; the fastest of three."""
    size, data, ours, own = sum(base.stored(name).nbytes for name in base.names), os.urandom(1 << 26), [], []
    for _ in range(3):
        begin = time.process_time()
        Digested(base).tensor_digests(threads=1)
        ours.append(time.process_time() - begin)
        begin = time.process_time()
        blake3(data).digest()
        own.append(time.process_time() - begin)
    rate = size / min(ours) / 1e9
    return {"gb_per_s_core": rate, "vs_hash": rate / (len(data) / min(own) / 1e9)}


if __name__ == "__main__":
    main()
