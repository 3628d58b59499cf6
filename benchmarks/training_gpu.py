"""Training steps on one GPU in bf16: ours beside HF Trainer without and with torch.compile, ZeRO-3, a teacher, kernels.

    python benchmarks/training_gpu.py [--quick] [--cpu]

Drawn weights, made text: RoBERTa-base and -large (masked, 512 tokens) and the shape of a Llama of 1B (causal, 2,048).
One training after the other, each in a process of its own; seconds are medians of turns of ten steps after ten. The
last line is a JSON list, a row per measurement, null without a GPU; `--quick` takes two turns and no kernels, `--cpu`
tries the code with tiny shapes on a CPU. benchmarks/training.py runs it as its part `gpu`.

MFU: model FLOP per second over the card's dense bf16 peak. Per token 6 per element of the layers' matrices, 6 per
element of the head's matrices for each token that is told, and attention's products, 12 x layers x width x length, half
of it where a token sees only those before it: what a model needs, whatever more a side computes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from plan import make_base, make_texts
from training_case import ROOT, Case, write_batches
from training_hf import peer
from training_ours import ours
from training_turns import Side

from recyclable.planning.devices import peak_flops

_ROBERTA = {"model_type": "roberta", "vocab_size": 50_265, "max_position_embeddings": 514}
_LLAMA = {"model_type": "llama", "vocab_size": 128_256, "max_position_embeddings": 2048, "tie_word_embeddings": True}
_TOLD = {"masked": 0.15, "causal": 1.0}


@dataclass(frozen=True)
class Shape:
    """A model, and the batches it is trained on."""

    name: str
    lm: str
    fields: dict[str, Any]
    layers: int
    width: int
    inner: int
    heads: int
    rows: int
    length: int

    def config(self) -> dict[str, Any]:
        """As transformers has it."""
        sizes = {"num_hidden_layers": self.layers, "hidden_size": self.width, "intermediate_size": self.inner}
        return {**self.fields, **sizes, "num_attention_heads": self.heads}

    def flops_per_token(self) -> float:
        """Of a training step, as this file's first lines say."""
        keys = self.fields.get("num_key_value_heads", self.heads) / self.heads
        gated = 3 if self.lm == "causal" else 2
        layers = self.layers * (2 * (1 + keys) * self.width**2 + gated * self.width * self.inner)
        head = self.width * self.fields["vocab_size"] + (self.width**2 if self.lm == "masked" else 0)
        attention = (6 if self.lm == "causal" else 12) * self.layers * self.width * self.length
        return 6 * layers + 6 * _TOLD[self.lm] * head + attention


SHAPES = (
    Shape("RoBERTa-base", "masked", _ROBERTA, 12, 768, 3072, 12, 128, 512),
    Shape("RoBERTa-large", "masked", _ROBERTA, 24, 1024, 4096, 16, 64, 512),
    Shape("Llama 1B", "causal", {**_LLAMA, "num_key_value_heads": 8}, 16, 2048, 8192, 32, 8, 2048),
)
TINY = (
    Shape("RoBERTa 2 x 64", "masked", {**_ROBERTA, "vocab_size": 5000}, 2, 64, 128, 2, 4, 32),
    Shape("Llama 2 x 64", "causal", {**_LLAMA, "num_key_value_heads": 1, "vocab_size": 5000}, 2, 64, 128, 2, 4, 32),
)


@dataclass(frozen=True)
class GpuCase(Case):
    """A case on a GPU; losses are logged once a turn, since each log waits for the device."""

    ds: str = "350m_zero1"
    compiled: bool = False
    """Whether the peer is."""
    teacher: bool = False
    """Whether ours learns from a frozen copy of the base as well."""

    def ds_config(self) -> dict[str, Any]:
        """A shipped one, a step in one micro-batch."""
        told = json.loads((ROOT / "ds_configs" / f"{self.ds}.json").read_text())
        return told | {"train_micro_batch_size_per_gpu": self.rows}

    def trainer(self) -> dict[str, Any]:
        """The Trainer alone: DeepSpeed only costs it time on one GPU."""
        cpu = {} if torch.cuda.is_available() else {"use_cpu": True}
        return {**cpu, "torch_compile": self.compiled, "logging_steps": self.each}

    def run(self, out: Path) -> dict[str, Any]:
        """With a teacher where there is one."""
        more = {"teacher": str(Path(self.folder) / "base")} if self.teacher else {}
        return super().run(out) | {"log_every": self.each} | more


def main() -> None:
    """Measure, print the rows as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two turns, no kernels")
    parser.add_argument("--cpu", action="store_true", help="tiny shapes on a CPU: tries the code, says nothing")
    arguments = parser.parse_args()
    rows = None
    if arguments.cpu or torch.cuda.is_available():
        rows = measure(TINY if arguments.cpu else SHAPES, arguments.quick, arguments.cpu)
    print(json.dumps(rows))


def measure(shapes: tuple[Shape, ...], quick: bool, on_cpu: bool) -> list[dict[str, Any]]:
    """All rows; a part's have the same columns."""
    rows: list[dict[str, Any]] = []
    for shape in shapes:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            make_base(folder / "base", shape.config())
            make_texts(folder, shape.length, 2 * shape.rows)
            rows += compared(shape, folder, 2 if quick else 5, on_cpu)
    if not (quick or on_cpu):
        command = [sys.executable, str(Path(__file__).with_name("kernels.py")), "--quick", "--json"]
        told = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        rows += [{"part": "kernels", **row} for row in json.loads(told.splitlines()[-1])["rows"]]
    return rows


def compared(shape: Shape, folder: Path, pairs: int, on_cpu: bool) -> list[dict[str, Any]]:
    """One model's rows: ours and the peers, ZeRO-3 and a teacher over ours."""
    few = {"warm": 2, "each": 2} if on_cpu else {"warm": 10, "each": 10}

    def taken(name: str, work: Any, **more: Any) -> tuple[float | None, float | None]:
        """Seconds of a step and peak MB; None where it does not fit, or a peer fails."""
        told = {"model": shape.name, "lm": shape.lm, "folder": str(folder), "corpus": str(folder / "corpus.txt")}
        told |= {"stage": 1, "ranks": 1, "precision": "bf16", "rows": shape.rows, "length": shape.length}
        case = GpuCase(**told, pairs=pairs, **few, **more)
        if not (folder / "batches.pt").exists():
            write_batches(case, folder)
        print(f"{shape.name}: {name}", file=sys.stderr, flush=True)
        side = None
        try:
            side = Side(work, case, folder / name, "spawn")
            seconds = statistics.median(side.turn() / case.each for _ in range(pairs))
            side.end()
        except RuntimeError as error:
            if work is ours and "out of memory" not in str(error):
                raise
            print(error, file=sys.stderr, flush=True)  # a peer that fails costs its own row alone
            return None, None
        finally:
            if side is not None:
                side.kill()
        return seconds, side.peak_mb

    device = "cpu" if on_cpu else torch.cuda.get_device_name()
    found = {"ours": taken("ours", ours), "HF Trainer": taken("hf", peer)}
    found["HF Trainer + torch.compile"] = taken("hf-compile", peer, compiled=True)
    plain, rows = found["ours"][0], []
    for who, (seconds, peak) in found.items():
        speed = seconds and shape.rows * shape.length / seconds
        top = peak_flops()
        mfu = speed * shape.flops_per_token() / top if speed and top else None
        ratio = seconds / plain if seconds and plain else None
        row = {
            "model": shape.name,
            "who": who,
            "tokens_per_s": speed,
            "mfu": mfu,
            "ours_speedup": ratio,
            "peak_mb": peak,
        }
        rows.append({"part": "training", "device": device, **row})
    over = {"ZeRO-3": {"ds": "3b_zero3"}, "online teacher": {"teacher": True}}
    for what, more in over.items():
        seconds, peak = taken(what.replace(" ", "-"), ours, **more)
        ratio = seconds / plain if seconds and plain else None
        row = {"model": shape.name, "what": what, "step_s": seconds, "over_plain": ratio, "peak_mb": peak}
        rows.append({"part": "over plain ZeRO-1", "device": device, **row})
    return rows


if __name__ == "__main__":
    main()
