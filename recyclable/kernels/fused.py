"""What happens to a chunk's logits, in Triton: one program a row, losses and gradient from two or three readings.

The products with the heads stay cuBLAS's. A row is read once for its normalisers (online softmax, Milakov and
Gimelshein 2018, arXiv 1805.02867), once more for the mean that the gradients of `reverse` and `jensen_shannon` need,
and once for losses and gradient. Every other reading runs backwards: it begins with what the last one left in cache.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from recyclable.kernels.chunked import LACKING, Logits
from recyclable.kernels.inputs import LossSettings

BLOCK = 4096
"""Logits of a row read at once."""
WARPS = 8


def row_gradient(
    student: Logits,
    teacher: Logits | None,
    targets: torch.Tensor | None,
    settings: LossSettings,
    gradient: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `RowGradient`, for products in fp32 or 16 bits."""
    tokens, vocabulary = student.products.shape
    losses = student.products.new_zeros(2, tokens, dtype=torch.float32)
    widest = max(vocabulary, 0 if teacher is None else teacher.products.shape[1])
    _rows[(tokens,)](
        *_arguments(student),
        *(_arguments(teacher) if teacher else [None] * 6),
        targets,
        gradient,
        None if gradient is None else gradient.stride(0),
        losses[0],
        losses[1],
        settings.hard_weight,
        settings.soft_weight * settings.temperature,
        1 / settings.temperature,
        settings.mixing,
        math.log(settings.mixing),
        math.log1p(-settings.mixing),
        settings.ignore_index,
        DIVERGENCE=settings.divergence,
        BLOCK=min(BLOCK, triton.next_power_of_2(widest)),
        num_warps=WARPS,
    )
    return losses[0], losses[1]


def _arguments(logits: Logits) -> list[object]:
    products, bias, scale, cap = logits
    return [products, products.stride(0), products.shape[1], bias, scale, cap]


_NONE = tl.constexpr(LACKING)
_HAS = tl.constexpr(LACKING * 1e-10)


@triton.jit
def _tanh(x):
    """From exp; near 0, where 1 - exp(-2x) loses digits, the series."""
    small = tl.exp(-2 * tl.abs(x))
    far = tl.where(x < 0, small - 1, 1 - small) / (1 + small)
    y = x * x
    near = x * (1 - y * (1 / 3 - y * (2 / 15 - y * (17 / 315 - y * 62 / 2835))))
    return tl.where(y < 0.04, near, far)


@triton.jit
def _load(row, columns, vocabulary, bias, scale, cap):
    """Logits at the columns, and which of them exist."""
    inside = columns < vocabulary
    logits = tl.load(row + columns, mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        logits += tl.load(bias + columns, mask=inside, other=0.0)
    logits *= scale
    if cap is not None:
        logits = cap * _tanh(logits / cap)
    logits = tl.where(inside, logits, _NONE)
    return logits, logits > _HAS


@triton.jit
def _seen(largest, total, logits, has):
    """Online softmax: the largest logit so far, and Σ exp(logit - largest)."""
    logits = tl.where(has, logits, _NONE)
    new = tl.maximum(largest, tl.max(logits, 0))
    return new, total * tl.exp(largest - new) + tl.sum(tl.where(has, tl.exp(logits - new), 0.0), 0)


@triton.jit
def _softmax(logits, has, inverse_temperature, largest, log_sum):
    """Log-probabilities (LACKING, hence finite, for what is lacking) and probabilities."""
    log = tl.where(has, (logits * inverse_temperature - largest) - log_sum, _NONE)
    return log, tl.exp(log)


@triton.jit
def _log_mean(log_q, log_p, log_rest, log_beta):
    """log(β p + (1-β) q)."""
    a, b = log_q + log_rest, log_p + log_beta
    larger = tl.maximum(a, b)
    return larger + tl.log(1 + tl.exp(tl.minimum(a, b) - larger))


@triton.jit
def _rows(
    student,
    student_stride,
    student_vocabulary,
    student_bias,
    student_scale,
    student_cap,
    teacher,
    teacher_stride,
    teacher_vocabulary,
    teacher_bias,
    teacher_scale,
    teacher_cap,
    targets,
    gradient,
    gradient_stride,
    hard_losses,
    soft_losses,
    hard_weight,
    soft_weight,
    inverse_temperature,
    beta,
    log_beta,
    log_rest,
    ignore_index,
    DIVERGENCE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """h is softmax(student), q softmax(student / T), p softmax(teacher / T), m = β p + (1-β) q."""
    row = tl.program_id(0).to(tl.int64)
    student += row * student_stride
    union = student_vocabulary
    if teacher is not None:
        teacher += row * teacher_stride
        union = tl.maximum(student_vocabulary, teacher_vocabulary)
    keep = 1.0
    if targets is not None:
        target = tl.load(targets + row)
        keep = tl.where(target == ignore_index, 0.0, 1.0)
    blocks = tl.cdiv(union, BLOCK)

    h_max = tl.full((), _NONE, tl.float32)
    q_max = h_max
    p_max = h_max
    h_sum = tl.full((), 0.0, tl.float32)
    q_sum = h_sum
    p_sum = h_sum
    for block in range(blocks):
        columns = block * BLOCK + tl.arange(0, BLOCK)
        s, s_has = _load(student, columns, student_vocabulary, student_bias, student_scale, student_cap)
        if targets is not None:
            h_max, h_sum = _seen(h_max, h_sum, s, s_has)
        if teacher is not None:
            t, t_has = _load(teacher, columns, teacher_vocabulary, teacher_bias, teacher_scale, teacher_cap)
            p_max, p_sum = _seen(p_max, p_sum, t * inverse_temperature, t_has)
            if DIVERGENCE == "reverse":
                s_has = s_has & t_has
            q_max, q_sum = _seen(q_max, q_sum, s * inverse_temperature, s_has)
    shared = tl.where((q_sum > 0) & (p_sum > 0), keep, 0.0)
    h_log = tl.log(tl.where(h_sum > 0, h_sum, 1.0))
    q_log = tl.log(tl.where(q_sum > 0, q_sum, 1.0))
    p_log = tl.log(tl.where(p_sum > 0, p_sum, 1.0))

    mean = tl.full((), 0.0, tl.float32)  # of log q - log p (reverse) or log q - log m, under q
    if teacher is not None and DIVERGENCE != "forward":
        for block in range(blocks):
            columns = (blocks - 1 - block) * BLOCK + tl.arange(0, BLOCK)
            s, s_has = _load(student, columns, student_vocabulary, student_bias, student_scale, student_cap)
            t, t_has = _load(teacher, columns, teacher_vocabulary, teacher_bias, teacher_scale, teacher_cap)
            log_p, p = _softmax(t, t_has, inverse_temperature, p_max, p_log)
            if DIVERGENCE == "reverse":
                log_q, q = _softmax(s, s_has & t_has, inverse_temperature, q_max, q_log)
                mean += tl.sum(q * (log_q - log_p), 0)
            else:
                log_q, q = _softmax(s, s_has, inverse_temperature, q_max, q_log)
                mean += tl.sum(q * (log_q - _log_mean(log_q, log_p, log_rest, log_beta)), 0)

    hard = tl.full((), 0.0, tl.float32)
    soft = hard
    for block in range(blocks):
        if teacher is not None and DIVERGENCE != "forward":
            columns = block * BLOCK + tl.arange(0, BLOCK)
        else:
            columns = (blocks - 1 - block) * BLOCK + tl.arange(0, BLOCK)
        s, s_has = _load(student, columns, student_vocabulary, student_bias, student_scale, student_cap)
        slope = tl.zeros([BLOCK], tl.float32)
        if targets is not None:
            log_h, h = _softmax(s, s_has, 1.0, h_max, h_log)
            hit = columns == target
            hard -= tl.sum(tl.where(hit, log_h, 0.0), 0)
            slope += keep * hard_weight * (h - tl.where(hit, 1.0, 0.0))
        if teacher is not None:
            t, t_has = _load(teacher, columns, teacher_vocabulary, teacher_bias, teacher_scale, teacher_cap)
            log_p, p = _softmax(t, t_has, inverse_temperature, p_max, p_log)
            if DIVERGENCE == "reverse":
                s_has = s_has & t_has
            log_q, q = _softmax(s, s_has, inverse_temperature, q_max, q_log)
            if DIVERGENCE == "forward":
                soft += tl.sum(p * (log_p - log_q), 0)
                slope += shared * soft_weight * (q - p)
            elif DIVERGENCE == "reverse":
                soft = mean
                slope += shared * soft_weight * q * (log_q - log_p - mean)
            else:
                log_m = _log_mean(log_q, log_p, log_rest, log_beta)
                soft += beta * tl.sum(p * (log_p - log_m), 0)
                slope += shared * soft_weight * (1 - beta) * q * (log_q - log_m - mean)
        if gradient is not None:
            slope *= student_scale
            inside = columns < student_vocabulary
            if student_cap is not None:
                ratio = tl.where(inside, s, 0.0) / student_cap
                slope *= 1 - ratio * ratio
            place = gradient + row * gradient_stride + columns
            tl.store(place, slope.to(gradient.dtype.element_ty), mask=inside)
    if teacher is not None and DIVERGENCE == "jensen_shannon":
        soft += (1 - beta) * mean
    if targets is not None:
        tl.store(hard_losses + row, keep * hard)
    if teacher is not None:
        tl.store(soft_losses + row, shared * soft)
