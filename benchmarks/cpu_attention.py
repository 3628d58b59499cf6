"""Attention in bf16 on a CPU by length: torch's fused kernel beside the products and softmax that it stands for.

    python benchmarks/cpu_attention.py [--quick] [--json] [--heads N] [--width N] [--docs]

CPU time of one thread, forward alone and with the backward pass, the least of several tries, and the largest error of a
gradient, over its norm, against fp64. `--docs` writes the table of docs/memory.md. The last line with `--json`:
{"rows": [{"keys", "fused_forward_ms", "fused_ms", "fused_error", "written_out_forward_ms", "written_out_ms",
"written_out_error", "chosen"}]}.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from training_tables import between_marks, table, told_of

from recyclable.architectures.attention import written_out

DOCUMENT = Path(__file__).parents[1] / "docs" / "memory.md"
TOKENS, KEYS = 2048, (32, 64, 128, 256, 512, 1024)
BACKENDS = {"fused": SDPBackend.FLASH_ATTENTION, "written_out": SDPBackend.MATH}


def main() -> None:
    """Measure, print a table or one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two lengths, few tries")
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--width", type=int, default=64, help="of a head")
    parser.add_argument("--docs", action="store_true", help="write the table of docs/memory.md")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)  # as recyclable has it
    tries = 2 if arguments.quick else 10
    rows = [row(keys, arguments.heads, arguments.width, tries) for keys in (KEYS[:2] if arguments.quick else KEYS)]
    shown = as_table(rows)
    print(shown)
    if arguments.docs:
        content = f"{told_of(f'The least of {tries} tries')}\n\n{shown}"
        DOCUMENT.write_text(between_marks(DOCUMENT.read_text(encoding="utf-8"), "attention", content), encoding="utf-8")
    if arguments.json:
        print(json.dumps({"rows": rows}))


def row(keys: int, heads: int, width: int, tries: int) -> dict[str, Any]:
    """One length: 2,048 tokens in sequences of so many."""
    inputs = [torch.randn(TOKENS // keys, heads, keys, width, dtype=torch.bfloat16, requires_grad=True) for _ in "qkv"]
    given = torch.randn_like(inputs[0])
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    right = torch.autograd.grad(scaled_dot_product_attention(*exact), exact, given.double())
    found: dict[str, Any] = {"keys": keys}
    for name, backend in BACKENDS.items():
        forward, whole = [], []
        for _ in range(tries):
            begin = time.process_time()
            with sdpa_kernel(backend):
                out = scaled_dot_product_attention(*inputs)
            forward.append(time.process_time() - begin)
            gradients = torch.autograd.grad(out, inputs, given)
            whole.append(time.process_time() - begin)
        error = max(float((own - each).norm() / each.norm()) for own, each in zip(gradients, right, strict=True))
        found |= {f"{name}_forward_ms": 1e3 * min(forward), f"{name}_ms": 1e3 * min(whole), f"{name}_error": error}
    return {**found, "chosen": "written out" if written_out(*inputs[:2]) else "fused"}


def as_table(rows: list[dict[str, Any]]) -> str:
    """For people."""
    heads = [
        "tokens",
        "fused, forward",
        "fused, with backward",
        "written out, forward",
        "with backward",
        "error, fused",
    ]
    heads += ["error, written out", "taken"]
    names = ("fused_forward_ms", "fused_ms", "written_out_forward_ms", "written_out_ms")
    lines = [
        [
            *(str(each["keys"]), *(f"{each[name]:.1f} ms" for name in names)),
            *(f"{each['fused_error']:.4f}", f"{each['written_out_error']:.4f}", each["chosen"]),
        ]
        for each in rows
    ]
    return table(heads, lines)


if __name__ == "__main__":
    main()
