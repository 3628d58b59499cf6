"""Memory and time of what saves memory, over training without it, with the same losses.

    python benchmarks/savings.py [--quick] [--json]

A causal model (Llama's shape, drawn, 8 layers x 256, vocabulary 4,096) on 8 rows x 512 tokens a step, ZeRO-3 on one
rank in fp32, through the engine and the step of every run. `peak_mb`: anonymous memory at its most over what the
process held before the model existed; `step_s`: median of the steps after the first; `loss_difference`: the largest of
any step, relative. On a machine without a GPU what is offloaded to host memory does not leave the memory that is
measured, and neither does what is pinned for NVMe: there they show their cost. Each run has a process of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
# As in a run: memory that is freed goes back to the system, else the peak is of what once was.
os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", "65536")

import torch
from memory import in_process
from transformers import LlamaConfig, LlamaForCausalLM

from recyclable import distributed
from recyclable.config.settings import TrainSettings
from recyclable.objectives.token_loss import TokenLoss
from recyclable.training.engine import engine_for

SIZE = {"hidden_size": 256, "intermediate_size": 688, "num_attention_heads": 4, "vocab_size": 4096}
AGAIN = {"activation_checkpointing": {}}
ON_HOST = {"activation_checkpointing": {"cpu_checkpointing": True}}


def main() -> None:
    """Print the table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="2 layers, 2 rows, 2 steps")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    figures = measure(arguments.quick)
    if arguments.json:
        print(json.dumps({"savings": figures}))
        return
    print("| | peak MB | s per step | largest relative difference of a loss |\n|---|---|---|---|")
    for row in figures:
        print(f"| {row['name']} | {row['peak_mb']:.0f} | {row['step_s']:.2f} | {row['loss_difference']:.0e} |")


def measure(quick: bool) -> list[dict[str, Any]]:
    """A row for each way to save memory, none first."""
    rows = []
    for name in ways(Path()):
        found, peak = in_process(trained, name, quick)
        rows.append({"name": name, "peak_mb": peak, "step_s": found["step_s"], "losses": found["losses"]})
    plain = rows[0]["losses"]
    for row in rows:
        pairs = zip(row.pop("losses"), plain, strict=True)
        row["loss_difference"] = max(abs(own - other) / abs(other) for own, other in pairs)
    return rows


def ways(nvme: Path) -> dict[str, dict[str, Any]]:
    """What is told of each in a ds_config, `zero_optimization` apart from its stage."""
    on_nvme = {"device": "nvme", "nvme_path": str(nvme)}
    parameters = {**on_nvme, "buffer_count": 4, "buffer_size": 2_000_000, "max_in_cpu": 0}
    optimizer, both = {"offload_optimizer": {"device": "cpu"}}, {"offload_param": {"device": "cpu"}}
    return {
        "none": {},
        "gradient checkpointing": AGAIN,
        "and its inputs in host memory": ON_HOST,
        "optimizer in host memory": {"zero_optimization": optimizer},
        "optimizer and weights in host memory": {"zero_optimization": {**optimizer, **both}},
        "optimizer on NVMe": {"zero_optimization": {"offload_optimizer": on_nvme}},
        "optimizer and weights on NVMe": {
            "zero_optimization": {"offload_optimizer": on_nvme, "offload_param": parameters}
        },
        "all of it": {**ON_HOST, "zero_optimization": {"offload_optimizer": on_nvme, "offload_param": parameters}},
    }


def trained(name: str, quick: bool) -> dict[str, Any]:
    """Seconds of a step and the losses of all steps."""
    rows, steps, layers, length = (2, 2, 2, 128) if quick else (8, 4, 8, 512)
    distributed.init()
    with contextlib.redirect_stdout(sys.stderr), tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**SIZE, num_hidden_layers=layers, max_position_embeddings=length))
        objective = TokenLoss(model, "clm")
        settings = TrainSettings(
            out=Path(folder), max_steps=steps, learning_rate=1e-3, train_batch_size=rows, max_length=length
        )
        more = ways(Path(folder))[name]
        zero = {"stage": 3, "stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": 0}
        zero |= {"stage3_prefetch_bucket_size": 0, "reduce_bucket_size": 1_000_000, "sub_group_size": 2_000_000}
        ds_config = {**more, "zero_optimization": {**zero, **more.get("zero_optimization", {})}}
        losses, seconds = [], []
        with engine_for(objective, settings, ds_config, Path(folder)) as engine:
            engine.train()
            for step in range(steps):
                batch = causal_batch(rows, length, seed=step)
                begin = time.perf_counter()
                loss = engine(batch)["clm"] / batch["targets"].numel()
                engine.backward(loss)
                engine.step()
                seconds.append(time.perf_counter() - begin)
                losses.append(loss.item())
    distributed.shutdown()
    return {"losses": losses, "step_s": statistics.median(seconds[1:])}


def causal_batch(rows: int, length: int, seed: int) -> dict[str, torch.Tensor]:
    """Drawn tokens; every one but the first is told."""
    ids = torch.randint(SIZE["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(seed))
    places = torch.arange(rows * length).view(rows, length)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "positions": places[:, :-1].flatten(),
        "targets": ids[:, 1:].flatten(),
    }


if __name__ == "__main__":
    main()
