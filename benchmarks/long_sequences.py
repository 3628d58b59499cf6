"""Memory of one training step at long sequences: a decoder, the same with packed documents apart, and an encoder.

    python benchmarks/long_sequences.py [--quick] [--json]

Tiny drawn models (2 layers x 64 with 2 heads, vocabulary 1,024, fp32), one row of 4,096 to 32,768 tokens, forward and
backward through the objective of a run, layers computing again (gradient checkpointing). `peak_mb`: anonymous memory at
its most over what the process held before the model existed. What grows with the length alone doubles from column to
column; what grows with its square is four times as much.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", "65536")  # freed memory goes back to the system

import torch
from memory import in_process
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM

from recyclable.architectures.recomputing import recompute_layers
from recyclable.objectives.apart import Apart, Way
from recyclable.objectives.token_loss import TokenLoss

LENGTHS, QUICK = (4096, 8192, 16384, 32768), (512, 1024)
DOCUMENT = 1024
"""Tokens of each packed document."""
SIZE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
CASES = ("decoder", "decoder, documents apart", "encoder")


def main() -> None:
    """Print the table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="512 and 1,024 tokens")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    lengths = QUICK if arguments.quick else LENGTHS
    figures: dict[str, dict[int, float]] = {case: {} for case in CASES}
    for length in lengths:
        for case, found in figures.items():
            found[length] = in_process(step, case, length)[1]
            print(f"{case}, {length} tokens: {found[length]:.0f} MB", file=sys.stderr, flush=True)
    if arguments.json:
        print(json.dumps({"peak_mb": figures}))
        return
    print("| peak MB | " + " | ".join(f"{length:,}" for length in lengths) + " |\n|---" + "|---" * len(lengths) + "|")
    for case, found in figures.items():
        print(f"| {case} | " + " | ".join(f"{peak:.0f}" for peak in found.values()) + " |")


def step(case: str, length: int) -> float:
    """Forward and backward of one row; returns the loss."""
    torch.manual_seed(0)
    config: dict[str, Any] = {**SIZE, "vocab_size": 1024, "max_position_embeddings": length}
    bert = BertConfig(**config, attention_probs_dropout_prob=0.0)  # with dropout sdpa has all scores at once on a CPU
    model = BertForMaskedLM(bert) if case == "encoder" else LlamaForCausalLM(LlamaConfig(**config))
    recompute_layers(model.train())
    way = Apart(Way(masked=False), causal=True, window=None)  # what `attention: documents` finds for Llama
    objective = TokenLoss(model, "lm", *([way.inputs(model)] if "apart" in case else []))
    ids, places = torch.randint(1024, (1, length)), torch.arange(length)
    told = places[::7] if case == "encoder" else places[:-1]
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "documents": (places // DOCUMENT)[None],
        "positions": told,
        "targets": ids[0, told] if case == "encoder" else ids[0, 1:],
    }
    if "apart" not in case:
        del batch["documents"]
    loss = objective(batch)["lm"] / len(told)
    loss.backward()
    return loss.item()


if __name__ == "__main__":
    main()
