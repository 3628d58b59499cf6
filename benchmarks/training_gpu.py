"""Training steps on one GPU in bf16: ours beside HF Trainer, both without and with torch.compile; ZeRO-3, a teacher.

    python benchmarks/training_gpu.py [--quick] [--cpu]

Drawn weights without dropout, made text: RoBERTa-base and -large (masked, 512 tokens) and TinyLlama's shape, 1.1B
(causal, 2,048; the peer with liger-kernel where that is installed), then the fused losses of benchmarks/kernels.py. One
training after the other, each in a process of its own; seconds are medians of turns of ten steps after ten. The last
line is a JSON list, a row per measurement, null without a GPU; `--quick` takes two turns and no kernels, `--cpu` tries
the code with tiny shapes on a CPU. `loss_diff` is the mean absolute difference from ours, of the mean losses of turns.
benchmarks/training.py runs it as its part `gpu`.

MFU: model FLOP per second over the card's dense bf16 peak, by the convention of recyclable/training/flops.py: what a
model needs, whatever more a side computes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from plan import WORDS, make_base, make_texts
from training_case import BATCHES, ROOT, Case, write_batches
from training_hf import peer
from training_ours import ours
from training_turns import Side, loss_diff

from recyclable.planning.devices import peak_flops
from recyclable.planning.known import KNOWN, Known
from recyclable.recipes.planned import planned
from recyclable.recipes.pretrain_settings import read_pretrain_settings
from recyclable.training.flops import Work, model_flops

NO_DROPOUT = {"masked": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}}
"""Fields of a config by kind of model: both sides have to compute the same. Decoders' have none."""


@dataclass(frozen=True)
class Shape:
    """A model, and the batches it is trained on."""

    known: Known
    lm: str
    rows: int


SHAPES = (Shape(KNOWN["125M"], "masked", 128), Shape(KNOWN["355M"], "masked", 64), Shape(KNOWN["1.1B"], "causal", 8))


def tiny(shape: Shape) -> Shape:
    """The same family, of 2 layers x 64 and 32 tokens."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    if "num_key_value_heads" in shape.known.config:
        sizes["num_key_value_heads"] = 1
    config = {**shape.known.config, **sizes, "vocab_size": WORDS}
    return Shape(Known(f"{shape.known.name}, 2 x 64", config, 32), shape.lm, 4)


@dataclass(frozen=True)
class GpuCase(Case):
    """A case on a GPU; losses are logged once a turn, since each log waits for the device."""

    ds: str = "350m_zero1"
    compiled: bool = False
    """Whether the model is."""
    teacher: bool = False
    """Whether ours learns from a frozen copy of the base as well."""

    def ds_config(self) -> dict[str, Any]:
        """A shipped one, a step in one micro-batch."""
        told = json.loads((ROOT / "ds_configs" / f"{self.ds}.json").read_text())
        return told | {"train_micro_batch_size_per_gpu": self.rows}

    def trainer(self) -> dict[str, Any]:
        """The Trainer alone: DeepSpeed only costs it time on one GPU."""
        told = {"torch_compile": self.compiled, "logging_steps": self.each, "dataloader_num_workers": 2}
        if not torch.cuda.is_available():
            return {**told, "use_cpu": True}
        return {**told, "use_liger_kernel": self.lm == "causal" and find_spec("liger_kernel") is not None}

    def run(self, out: Path) -> dict[str, Any]:
        """Compiled and with a teacher where it is to be."""
        more = {"teacher": str(Path(self.folder) / "base")} if self.teacher else {}
        return super().run(out) | {"log_every": self.each, "torch_compile": self.compiled} | more


class Taken(NamedTuple):
    """What one training took."""

    seconds: float | None = None
    """Of a step."""
    peak_mb: float | None = None
    losses: dict[int, float] | None = None
    """Step -> mean loss since the one before."""


def step_flops(case: Case, told: float) -> float:
    """The model FLOPs of a step whose loss looks at so many tokens; of the base only its config is read."""
    settings = read_pretrain_settings(case.run(Path("unused")), "benchmark")
    return model_flops(planned(settings).objective).of(Work(case.rows, case.tokens, told))


def main() -> None:
    """Measure, print the rows as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two turns, no kernels")
    parser.add_argument("--cpu", action="store_true", help="tiny shapes on a CPU: tries the code, says nothing")
    arguments = parser.parse_args()
    rows = None
    if arguments.cpu or torch.cuda.is_available():
        shapes = tuple(map(tiny, SHAPES[1:])) if arguments.cpu else SHAPES
        rows = measure(shapes, arguments.quick, arguments.cpu)
    print(json.dumps(rows))


def measure(shapes: tuple[Shape, ...], quick: bool, on_cpu: bool) -> list[dict[str, Any]]:
    """All rows; a part's have the same columns."""
    rows: list[dict[str, Any]] = []
    for shape in shapes:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            make_base(folder / "base", {**shape.known.config, **NO_DROPOUT.get(shape.lm, {})})
            make_texts(folder, shape.known.length, 2 * shape.rows)
            rows += compared(shape, folder, 2 if quick else 5, on_cpu)
    if not (quick or on_cpu):
        command = [sys.executable, str(Path(__file__).with_name("kernels.py")), "--quick", "--json"]
        told = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        rows += [{"part": "kernels", **row} for row in json.loads(told.splitlines()[-1])["rows"]]
    return rows


def compared(shape: Shape, folder: Path, pairs: int, on_cpu: bool) -> list[dict[str, Any]]:
    """One model's rows: ours and the peers, ZeRO-3 and a teacher over ours."""
    few = {"warm": 2, "each": 2} if on_cpu else {"warm": 10, "each": 10}
    told = {"model": shape.known.name, "lm": shape.lm, "folder": str(folder), "corpus": str(folder / "corpus.txt")}
    told |= {"stage": 1, "ranks": 1, "precision": "bf16", "rows": shape.rows, "length": shape.known.length}
    plain_case = GpuCase(**told, pairs=pairs, **few)
    write_batches(plain_case, folder)
    flops = step_flops(plain_case, statistics.fmean(torch.load(folder / BATCHES, weights_only=True)["counts"]))

    def taken(name: str, work: Any, **more: Any) -> Taken:
        """One training; nothing is known of it where it does not fit, or a peer fails."""
        case = replace(plain_case, **more)
        print(f"{case.model}: {name}", file=sys.stderr, flush=True)
        side = None
        try:
            side = Side(work, case, folder / name, "spawn")
            seconds = statistics.median(side.turn() / case.each for _ in range(pairs))
            losses = side.end()
        except RuntimeError as error:
            if work is ours and "out of memory" not in str(error):
                raise
            print(error, file=sys.stderr, flush=True)  # a peer that fails costs its own row alone
            return Taken()
        finally:
            if side is not None:
                side.kill()
        return Taken(seconds, side.peak_mb, losses)

    device = "cpu" if on_cpu else torch.cuda.get_device_name()
    found = {"ours": taken("ours", ours), "ours + torch_compile": taken("ours-compile", ours, compiled=True)}
    found |= {"HF Trainer": taken("hf", peer), "HF Trainer + torch.compile": taken("hf-compile", peer, compiled=True)}
    (plain, _, own), rows, top = found["ours"], [], peak_flops()
    best = min((found[who].seconds for who in ("ours", "ours + torch_compile") if found[who].seconds), default=None)
    for who, (seconds, peak, losses) in found.items():
        apart = None
        with suppress(RuntimeError):  # of other steps than ours
            apart = loss_diff(own, losses) if own and losses else None
        row = {
            "model": plain_case.model,
            "who": who,
            "tokens_per_s": seconds and plain_case.tokens / seconds,
            "mfu": flops / seconds / top if seconds and top else None,
            "ours_speedup": seconds / best if seconds and best else None,
            "loss_diff": apart,
            "peak_mb": peak,
        }
        rows.append({"part": "training", "device": device, **row})
    over = {"ZeRO-3": {"ds": "3b_zero3"}, "online teacher": {"teacher": True}}
    for what, more in over.items():
        seconds, peak, _ = taken(what.replace(" ", "-"), ours, **more)
        ratio = seconds / plain if seconds and plain else None
        row = {"model": plain_case.model, "what": what, "step_s": seconds, "over_plain": ratio, "peak_mb": peak}
        rows.append({"part": "over plain ZeRO-1", "device": device, **row})
    return rows


if __name__ == "__main__":
    main()
