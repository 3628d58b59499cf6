"""Attention on a CPU by length: torch's fused kernel beside the products and softmax that it stands for.

    python benchmarks/cpu_attention.py [--quick] [--json] [--precision bf16 | fp32] [--heads N] [--width N] [--docs]

CPU time of one thread, forward alone and with the backward pass, the least of several tries, and the largest error of a
gradient, over its norm, against fp64, of scores with a standard deviation of 1 and of 5. `--docs` writes the table of
docs/memory.md. The last line with `--json`: {"rows": [{"keys", "fused_forward_ms", "fused_ms", "fused_error",
"fused_error_5", "written_out_forward_ms", "written_out_ms", "written_out_error", "written_out_error_5", "chosen"}]}.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from training_tables import between_marks, table, told_of

from recyclable.architectures.short_attention import is_short, written_out

DOCUMENT = Path(__file__).parents[1] / "docs" / "memory.md"
TOKENS, KEYS = 2048, (32, 64, 128, 256, 512, 1024)
WAYS = {"fused": scaled_dot_product_attention, "written_out": written_out}


def main() -> None:
    """Measure, print a table or one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two lengths, few tries")
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--width", type=int, default=64, help="of a head")
    parser.add_argument("--docs", action="store_true", help="write the table of docs/memory.md")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tries, dtype = 2 if arguments.quick else 10, {"bf16": torch.bfloat16, "fp32": torch.float32}[arguments.precision]
    lengths = KEYS[:2] if arguments.quick else KEYS
    rows = [row(keys, arguments.heads, arguments.width, tries, dtype) for keys in lengths]
    shown = as_table(rows)
    print(shown)
    if arguments.docs:
        content = f"{told_of(f'The least of {tries} tries')}\n\n{shown}"
        DOCUMENT.write_text(between_marks(DOCUMENT.read_text(encoding="utf-8"), "attention", content), encoding="utf-8")
    if arguments.json:
        print(json.dumps({"rows": rows}))


def row(keys: int, heads: int, width: int, tries: int, dtype: torch.dtype) -> dict[str, Any]:
    """One length: 2,048 tokens in sequences of so many."""
    inputs = [torch.randn(TOKENS // keys, heads, keys, width, dtype=dtype, requires_grad=True) for _ in "qkv"]
    given = torch.randn_like(inputs[0])
    sharp = [(inputs[0].detach() * 5).requires_grad_(), *inputs[1:]]
    found: dict[str, Any] = {"keys": keys}
    for name, attend in WAYS.items():
        forward, whole = [], []
        for _ in range(tries):
            begin = time.process_time()
            out = attend(*inputs)
            forward.append(time.process_time() - begin)
            torch.autograd.grad(out, inputs, given)
            whole.append(time.process_time() - begin)
        found |= {f"{name}_forward_ms": 1e3 * min(forward), f"{name}_ms": 1e3 * min(whole)}
        found |= {f"{name}_error": error(attend, inputs, given), f"{name}_error_5": error(attend, sharp, given)}
    return {**found, "chosen": "written out" if is_short(*inputs[:2]) else "fused"}


def error(attend: Any, inputs: list[torch.Tensor], given: torch.Tensor) -> float:
    """The largest of a gradient, over its norm."""
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    right = torch.autograd.grad(scaled_dot_product_attention(*exact), exact, given.double())
    gradients = torch.autograd.grad(attend(*inputs), inputs, given)
    return max(float((own - each).norm() / each.norm()) for own, each in zip(gradients, right, strict=True))


def as_table(rows: list[dict[str, Any]]) -> str:
    """For people."""
    heads = ["tokens", "fused, forward", "fused, with backward", "written out, forward", "written out, with backward"]
    heads += ["error, fused", "written out", "error, scores of 5, fused", "written out", "taken"]
    times = ("fused_forward_ms", "fused_ms", "written_out_forward_ms", "written_out_ms")
    errors = ("fused_error", "written_out_error", "fused_error_5", "written_out_error_5")
    lines = [
        [
            *(str(each["keys"]), *(f"{each[name]:.1f} ms" for name in times)),
            *(*(f"{each[name]:.2g}" for name in errors), each["chosen"]),
        ]
        for each in rows
    ]
    return table(heads, lines)


if __name__ == "__main__":
    main()
