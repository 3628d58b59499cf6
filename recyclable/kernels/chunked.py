"""The distillation loss over chunks of tokens: four matrix products, gradients found in the forward pass.

Only one chunk's logits exist at a time, in fp32 unless the settings say bf16, and the weight gradient is summed in
fp32. What happens to a chunk's logits is a `RowGradient`: recyclable/kernels/rows.py in PyTorch,
recyclable/kernels/fused.py in Triton.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch.autograd.function import once_differentiable

from recyclable.kernels import tiling
from recyclable.kernels.inputs import (
    Head,
    LossSettings,
    LossSums,
    Taught,
    TaughtLogits,
    TaughtStates,
    TaughtTopK,
    select,
    teacher_vocabulary,
)

# A chunk reads and writes the fp32 sum of weight gradients once (8 V H bytes) for 2 C V H FLOP: on an H100
# (990 TFLOP/s, 3.35 TB/s) arithmetic takes longer from C = 1,200 on.
GPU_TOKENS = 2048
# Enough for matrix products near full speed; more while a chunk's logits stay below 64 MB.
CPU_TOKENS = 64
CPU_LOGITS = 2**24
VOCABULARY_BLOCK = 1024

LACKING = -1e30
"""The logit of a token that the teacher lacks: finite, so that nothing needs a mask to stay free of NaN."""


class Logits(NamedTuple):
    """Products h Wᵀ of one chunk, and what is still to be done to them, in fp32 (`bias` is) or more."""

    products: torch.Tensor
    bias: torch.Tensor | None
    scale: float
    softcap: float | None


class RowGradient(Protocol):
    """Losses of a chunk's tokens and the gradient with respect to the student's products."""

    def __call__(
        self,
        student: Logits,
        teacher: Logits | None,
        targets: torch.Tensor | None,
        settings: LossSettings,
        gradient: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Hard and soft losses [C]; both `products` [C, Vs], [C, Vt] may be overwritten.

        Args:
            targets: [C] or None for no hard loss.
            gradient: [C, Vs], filled; may be `student.products` itself. None computes losses only.
        """


def chunked_loss(
    hidden: torch.Tensor,
    head: Head,
    teacher: Taught | None,
    targets: torch.Tensor | None,
    settings: LossSettings,
    positions: torch.Tensor | None,
    rows: RowGradient,
) -> LossSums:
    """As `distillation_loss`, with the chunk's rows computed by `rows`."""
    hidden, teacher = select(hidden, head, teacher, targets, positions)
    device = hidden.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    if autocast is not None:
        hidden = hidden.to(autocast)
        if isinstance(teacher, TaughtStates):
            teacher = TaughtStates(teacher.hidden.to(autocast), _in(teacher.head, autocast))
    elif head.weight.dtype != hidden.dtype:
        raise ValueError(f"head weight: {head.weight.dtype}, expected {hidden.dtype} as the hidden states")
    with torch.autocast(device, enabled=False):
        return LossSums(
            *_Chunked.apply(
                hidden, head.weight, head.bias, head, teacher, targets, settings, rows, torch.is_grad_enabled()
            )
        )


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        head: Head,
        teacher: Taught | None,
        targets: torch.Tensor | None,
        settings: LossSettings,
        rows: RowGradient,
        training: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        wanted = [training and needed for needed in ctx.needs_input_grad[:3]]
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        precise = torch.promote_types(hidden.dtype, torch.float32)
        size = chunk_tokens(len(hidden), len(weight), hidden.is_cuda)
        # A sum of one addend needs no more digits than it is given away with; fp16 might not hold it unscaled.
        summed = precise if size < len(hidden) or weight.dtype == torch.float16 else weight.dtype
        dtypes = (hidden.dtype, summed, precise)
        grad_hidden, grad_weight, grad_bias = (
            tensor.new_zeros(tensor.shape, dtype=dtype) if want and tensor is not None else None
            for want, tensor, dtype in zip(wanted, (hidden, weight, bias), dtypes, strict=True)
        )
        weight = weight.to(hidden.dtype)  # under autocast; the gradient stays in the parameter's dtype
        losses = hidden.new_zeros(2, len(hidden), dtype=precise)
        precise_bias = None if bias is None else bias.to(precise)
        held = hidden.dtype if settings.logits == "bf16" and hidden.dtype == torch.bfloat16 else precise
        student_CV = hidden.new_empty(size, len(weight), dtype=held)
        # The last two products take 16-bit gradients where the states are; others stay in the logits' place.
        gradient_CV = student_CV
        if hidden.dtype != held:
            gradient_CV = torch.empty_like(student_CV, dtype=hidden.dtype)
        teacher_CV = None if teacher is None else student_CV.new_empty(size, _width(teacher, len(weight), settings))
        for chunk in tiling.tiles(len(hidden), size):
            count = chunk.stop - chunk.start
            project(hidden[chunk], weight, student_CV[:count])
            losses[0, chunk], losses[1, chunk] = rows(
                Logits(student_CV[:count], precise_bias, head.scale, head.softcap),
                None
                if teacher is None or teacher_CV is None
                else _teacher_logits(teacher, chunk, len(weight), settings, teacher_CV[:count]),
                None if targets is None else targets[chunk],
                settings,
                gradient_CV[:count] if any(wanted) else None,
            )
            if grad_hidden is not None:
                torch.mm(gradient_CV[:count], weight, out=grad_hidden[chunk])
            if grad_weight is not None:
                accumulate(grad_weight, gradient_CV[:count], hidden[chunk])
            if grad_bias is not None:
                grad_bias += gradient_CV[:count].sum(0)
        ctx.gradients = (grad_hidden, grad_weight, grad_bias)
        hard, soft = losses.sum(1)
        loss = settings.hard_weight * hard + settings.soft_weight * settings.temperature**2 * soft
        ctx.mark_non_differentiable(hard, soft)
        return loss, hard, soft

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: torch.Tensor, *_: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Scales what the forward pass left, in place, hence once. The scalar stays on the device."""
        if ctx.gradients is None:
            raise RuntimeError("a second backward pass through the same loss: its gradients have been given away")
        gradients, ctx.gradients = ctx.gradients, None
        scaled = (
            None if gradient is None else _scaled(gradient, grad_loss, dtype)
            for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
        )
        return (*scaled, None, None, None, None, None, None)


def _scaled(gradient: torch.Tensor, factor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The product in `dtype`, without more memory or more reading than that takes."""
    if gradient.is_cuda and gradient.dtype != dtype:
        return torch.mul(gradient, factor, out=torch.empty_like(gradient, dtype=dtype))
    return gradient.mul_(factor).to(dtype)  # on a CPU a product into another dtype is several times slower


def project(x_CH: torch.Tensor, weight_VH: torch.Tensor, out_CV: torch.Tensor) -> None:
    """out = x Wᵀ; in fp32 even from bf16, unless `out` is bf16: rounding a logit of 30 changes its probability by up
    to 6%."""
    if not x_CH.is_cuda:  # no such product from bf16 there: exact when both are widened
        wide_CH = x_CH.to(out_CV.dtype)
        for block in _vocabulary_blocks(weight_VH):
            torch.mm(wide_CH, weight_VH[block].to(out_CV.dtype).T, out=out_CV[:, block])
    elif weight_VH.dtype == out_CV.dtype:
        torch.mm(x_CH, weight_VH.T, out=out_CV)
    else:
        torch.mm(x_CH, weight_VH.T, out_dtype=out_CV.dtype, out=out_CV)


def accumulate(sum_VH: torch.Tensor, gradient_CV: torch.Tensor, x_CH: torch.Tensor) -> None:
    """sum += gradientᵀ x, in the sum's dtype; from bf16 on a CPU, what a chunk adds is rounded to bf16 first."""
    if gradient_CV.dtype == sum_VH.dtype:
        sum_VH.addmm_(gradient_CV.T, x_CH)
    elif x_CH.is_cuda:
        torch.addmm(sum_VH, gradient_CV.T, x_CH, out_dtype=sum_VH.dtype, out=sum_VH)
    else:
        for block in _vocabulary_blocks(sum_VH):
            sum_VH[block] += torch.mm(gradient_CV[:, block].T, x_CH)


def _vocabulary_blocks(of_V: torch.Tensor) -> Iterator[slice]:
    """Pieces of the vocabulary, on a CPU: their weights stay in cache between two operations."""
    return tiling.tiles(len(of_V), VOCABULARY_BLOCK)


def chunk_tokens(tokens: int, vocabulary: int, cuda: bool) -> int:
    """Tokens in a chunk: equal chunks, none larger than it should be."""
    most = GPU_TOKENS if cuda else max(CPU_TOKENS, CPU_LOGITS // vocabulary)
    chunks = max(1, -(-tokens // most))
    return max(1, -(-tokens // chunks))


def _width(teacher: Taught, student_vocabulary: int, settings: LossSettings) -> int:
    """The teacher's logits to hold: `forward` conditions it on the student's tokens, so no others are computed."""
    vocabulary = teacher_vocabulary(teacher)
    if settings.divergence == "forward" and not isinstance(teacher, TaughtTopK):
        return min(vocabulary, student_vocabulary)
    return vocabulary


def _teacher_logits(
    teacher: Taught, chunk: slice, student_vocabulary: int, settings: LossSettings, out_CV: torch.Tensor
) -> Logits:
    """The teacher's part of the chunk, written into `out`."""
    width = out_CV.shape[1]
    if isinstance(teacher, TaughtStates):
        head = teacher.head
        project(teacher.hidden[chunk], head.weight[:width], out_CV)
        bias = None if head.bias is None else head.bias[:width].to(torch.promote_types(out_CV.dtype, torch.float32))
        return Logits(out_CV, bias, head.scale, head.softcap)
    if isinstance(teacher, TaughtLogits):
        out_CV.copy_(teacher.logits[chunk, :width]).clamp_(min=LACKING)
    else:
        values = teacher.values[chunk].to(out_CV.dtype).clamp(min=LACKING)
        out_CV.fill_(LACKING).scatter_(1, teacher.indices[chunk], values)
        if settings.divergence == "forward":
            out_CV = out_CV[:, :student_vocabulary]
    return Logits(out_CV, None, 1.0, None)


def _in(head: Head, dtype: torch.dtype) -> Head:
    return Head(head.weight.to(dtype), head.bias, head.scale, head.softcap)
