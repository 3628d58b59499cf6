"""Weights as data, measured beside the usual ways: apply, sharded start, fingerprint, flipped bits, malformed files.

    python benchmarks/weights.py [--quick] [--json]

Every timed call runs in a fresh process, imports left out, files in the page cache. Memory is the peak of anonymous
memory (RssAnon, sampled every 2 ms) above what the process held after its imports.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from transformers import AutoModelForSequenceClassification, BertConfig

from recyclable.config import StartSettings
from recyclable.models import canonical_names, structure
from recyclable.recipes.apply import apply
from recyclable.weights.adapted import DELTA, HEAD, Manifest, write_manifest
from recyclable.weights.base import Base
from recyclable.weights.checkpoint_files import SafetensorsFile
from recyclable.weights.delta import Codec, write_delta
from recyclable.weights.digest import Digested
from recyclable.weights.files import write_json, write_safetensors
from recyclable.weights.fingerprint import fingerprint
from recyclable.weights.lineage import FILE, ancestors_for_child

MB = 1e6
LABELS = ["no", "yes"]


def main() -> None:
    """Measure, print a table or one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smaller models and fewer cases, under 3 minutes")
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    parser.add_argument("--scratch", type=Path, help="where models are written (default: the temporary directory)")
    arguments = parser.parse_args()
    from sharded_start import measure as sharded_start
    from store_safety import flips, fuzz

    with tempfile.TemporaryDirectory(dir=arguments.scratch) as folder:
        result = {"apply": measure_apply(Path(folder), arguments.quick), "fingerprint": measure_hash(Path(folder))}
    result["sharded_start"] = {"ranks": sharded_start(arguments.quick)}
    result["flips"], result["fuzz"] = flips(arguments.quick), fuzz(arguments.quick)
    for section, figures in result.items():
        print(f"{section:15} {json.dumps(figures)}")
    if arguments.json:
        print(json.dumps(result))


def measure_apply(root: Path, quick: bool) -> dict[str, Any]:
    """Speed and memory of `apply` on the largest model, memory on every size and with one huge tensor."""
    sizes = {"0.1 GB": 0.1, "0.25 GB": 0.25} if quick else {"0.25 GB": 0.25, "0.5 GB": 0.5, "1 GB": 1.0, "2 GB": 2.0}
    peaks, rates, speedup = {}, {}, None
    for label, gigabytes in sizes.items():
        folder = make_world(root / label, layers=round(gigabytes * 1e9 / 50.4e6), vocabulary=1000)
        seconds, peaks[label] = in_process(_apply, folder)
        rates[label] = _cat_and_copy(folder) / seconds
        if label in ("1 GB", "0.25 GB"):
            usual_seconds, usual_peak = in_process(_usual_way, folder)
            speedup = {"model": label, "ours_s": seconds, "usual_s": usual_seconds, "usual_peak_mb": usual_peak}
        shutil.rmtree(folder)
    rows = 65_536 if quick else 262_144
    folder = make_world(root / "tensor", layers=1, vocabulary=rows)
    peaks[f"one tensor of {rows * 4096 / 1e9:.2f} GB"] = in_process(_apply, folder)[1]
    shutil.rmtree(folder)
    return {
        "speedup": speedup["usual_s"] / speedup["ours_s"],
        "peak_mb_above_baseline": max(peaks.values()),
        "vs_cat_cp": list(rates.values())[-2 if not quick else -1],
        "details": {"speedup": speedup, "peak_mb": peaks, "vs_cat_cp": rates},
    }


def make_world(folder: Path, layers: int, vocabulary: int) -> Path:
    """old/, new/ (its upgrade), tuned/ (an HF checkpoint on old) and weights/ (its exact delta), random fp32."""
    config = BertConfig(
        vocab_size=vocabulary,
        hidden_size=1024,
        num_hidden_layers=layers,
        num_attention_heads=16,
        intermediate_size=4096,
        num_labels=len(LABELS),
        id2label=dict(enumerate(LABELS)),
    )
    model = structure(config)
    names, shapes = canonical_names(model), {n: tuple(p.shape) for n, p in model.named_parameters()}
    for seed, name in enumerate(("old", "new", "tuned")):
        (folder / name).mkdir(parents=True)
        scale, own = (1.0, 0) if name == "old" else (1e-3, seed)
        _write_model(folder / name / "model.safetensors", shapes, scale, own, folder / "old" / "model.safetensors")
        config.save_pretrained(folder / name)
    old, new = Base(folder / "old"), Base(folder / "new")
    prints = {base.folder.name: fingerprint(base).as_dict() for base in (old, new)}
    ancestors = ancestors_for_child(old.folder, str(old.folder), prints["old"])
    write_json(new.folder / FILE, {"format": 1, "fingerprint": prints["new"], "ancestors": ancestors})
    weights = folder / "weights"
    weights.mkdir()
    write_delta(weights / DELTA, Base(folder / "tuned"), old, Codec())
    tuned = SafetensorsFile(folder / "tuned" / "model.safetensors")
    head = {n: tuned[names[n]] for n in names if n not in old}
    write_safetensors(weights / HEAD, {n: (t.dtype, tuple(t.shape)) for n, t in head.items()}, head.items())
    manifest = Manifest(
        kind="delta",
        tuning={"tuning": "full"},
        task={"name": "none", "problem": "classification", "labels": LABELS, "digest": ""},
        base={"name": str(old.folder), "fingerprint": prints["old"]},
        method="tune",
        metrics={},
        history=[],
        settings={"seed": 20, "max_length": 128},
    )
    write_manifest(weights, manifest)
    return folder


def _write_model(path: Path, shapes: dict[str, tuple[int, ...]], scale: float, seed: int, old: Path) -> None:
    draw = torch.Generator().manual_seed(seed)
    before = SafetensorsFile(old) if old.exists() else None

    def tensors():
        for name, shape in shapes.items():
            noise = torch.empty(shape).normal_(0, 0.02 * scale, generator=draw)
            yield name, noise if before is None else before[name] + noise

    write_safetensors(path, {name: (torch.float32, shape) for name, shape in shapes.items()}, tensors())


def in_process(work: Callable[[Path], float], folder: Path) -> tuple[float, float]:
    """(seconds, peak MB of anonymous memory above the start) of `work` in a fresh process."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_watched, (work, folder))


def _watched(work: Callable[[Path], float], folder: Path) -> tuple[float, float]:
    peak, done = _anonymous(), threading.Event()
    start = peak

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, _anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    seconds = work(folder)
    done.set()
    watcher.join()
    return seconds, (peak - start) / MB


def _anonymous() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status names no RssAnon")


def _apply(folder: Path) -> float:
    begin = time.perf_counter()
    apply([folder / "weights"], folder / "new", folder / "out", StartSettings())
    return time.perf_counter() - begin


def _usual_way(folder: Path) -> float:
    begin = time.perf_counter()
    old, new, tuned = (
        AutoModelForSequenceClassification.from_pretrained(folder / name) for name in ("old", "new", "tuned")
    )
    base, weights = old.state_dict(), tuned.state_dict()
    with torch.no_grad():
        for name, tensor in new.state_dict().items():
            if name.startswith("bert.") and ".pooler." not in name:
                tensor += weights[name] - base[name]
            else:
                tensor.copy_(weights[name])
    new.save_pretrained(folder / "usual")
    return time.perf_counter() - begin


def _cat_and_copy(folder: Path) -> float:
    """Seconds to read base and delta and to copy the output with an fsync: what the disk and the kernel alone take."""
    out = folder / "out" / "model.safetensors"
    inputs = [folder / "new" / "model.safetensors", folder / "weights" / DELTA]
    begin = time.perf_counter()
    os.system("cat " + " ".join(f"'{path}'" for path in inputs) + " > /dev/null")
    os.system(f"cp --reflink=never '{out}' '{folder}/copy' && sync '{folder}/copy'")
    return time.perf_counter() - begin


def measure_hash(root: Path) -> dict[str, float]:
    """GB/s of fingerprinting on one core, and over BLAKE3's own speed on bytes that are in memory."""
    folder = make_world(root / "hash", layers=8, vocabulary=1000)
    base, data = Base(folder / "new"), os.urandom(1 << 26)
    size = sum(base.stored(name).nbytes for name in base.names)
    seconds, own = [], []
    for _ in range(3):
        begin = time.perf_counter()
        Digested(base).tensor_digests(threads=1)
        seconds.append(time.perf_counter() - begin)
        begin = time.perf_counter()
        blake3(data).digest()
        own.append(time.perf_counter() - begin)
    shutil.rmtree(folder)
    rate = size / min(seconds) / 1e9
    return {"gb_per_s_core": rate, "vs_hash": rate / (len(data) / min(own) / 1e9)}


if __name__ == "__main__":
    main()
