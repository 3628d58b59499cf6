"""Each token's cross-entropy, without gradient and without all tokens' logits: what likelihoods are made of."""

from __future__ import annotations

import torch

from recyclable.kernels import tiling
from recyclable.kernels.chunked import Logits, RowGradient, chunk_tokens, project
from recyclable.kernels.inputs import Head, LossSettings


@torch.no_grad()
def token_losses(hidden: torch.Tensor, head: Head, targets: torch.Tensor, rows: RowGradient) -> torch.Tensor:
    """Cross-entropy [M] (fp32) of states [M, H] against targets [M]; chunks and precision are those of the loss."""
    precise = torch.promote_types(hidden.dtype, torch.float32)
    size = chunk_tokens(len(hidden), len(head.weight), hidden.is_cuda)
    weight, bias = head.weight.to(hidden.dtype), None if head.bias is None else head.bias.to(precise)
    logits_CV, losses = hidden.new_empty(size, len(weight), dtype=precise), hidden.new_zeros(len(hidden), dtype=precise)
    with torch.autocast(hidden.device.type, enabled=False):
        for chunk in tiling.tiles(len(hidden), size):
            products = logits_CV[: chunk.stop - chunk.start]
            project(hidden[chunk], weight, products)
            student = Logits(products, bias, head.scale, head.softcap)
            losses[chunk], _ = rows(student, None, targets[chunk], LossSettings(), None)
    return losses
