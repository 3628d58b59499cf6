"""Compiles the row kernel for GPU architectures, without a GPU; run without Triton's interpreter."""

from __future__ import annotations

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from recyclable.kernels import fused


def compiled(architecture: int, divergence: str, everything: bool) -> triton.compiler.CompiledKernel:
    """With biases, caps and a bf16 gradient, or with none of them."""
    constants = {"DIVERGENCE": divergence, "BLOCK": fused.BLOCK}
    signature = {}
    for name in fused._rows.arg_names:
        optional = name.endswith(("_bias", "_cap")) or name.startswith("gradient")
        if name in constants or (optional and not everything):
            signature[name] = "constexpr"
            constants.setdefault(name, None)
        elif name in ("student", "teacher", "hard_losses", "soft_losses") or name.endswith("_bias"):
            signature[name] = "*fp32"
        elif name.endswith(("_stride", "_vocabulary", "_index")):
            signature[name] = "i32"
        else:
            signature[name] = {"targets": "*i64", "gradient": "*bf16"}.get(name, "fp32")
    places = {(fused._rows.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fused._rows, signature, constexprs=places)
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options={"num_warps": fused.WARPS})


for architecture in (80, 90):
    for divergence in ("forward", "jensen_shannon"):
        made = compiled(architecture, divergence, everything=divergence == "jensen_shannon")
        assert made.asm["cubin"]
        print(architecture, divergence)
