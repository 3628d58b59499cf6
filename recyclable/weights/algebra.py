"""Arithmetic on adapted weights: pure functions on tensors, sums in fp32, rounded once.

Task arithmetic (Ilharco et al. 2023, arXiv 2212.04089), TIES (Yadav et al. 2023, arXiv 2306.01708), DARE (Yu et al.
2024, arXiv 2311.03099). All but `low_rank` and `one_bit` are elementwise, so that any piece of a tensor gives that
piece of the result.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch

_DRAWN_TOGETHER = 1 << 16
"""Elements of a tensor that share one random stream."""


def add(base: torch.Tensor, delta: torch.Tensor, scale: float = 1.0, dtype: torch.dtype | None = None) -> torch.Tensor:
    """base + scale * delta of one shape, rounded to `dtype` (None: the base's)."""
    return torch.add(base.float(), delta.float(), alpha=scale).to(dtype or base.dtype)


def subtract(tuned: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """tuned - base in fp32."""
    return tuned.float() - base.float()


def weighted(tensors: Sequence[torch.Tensor], factors: Sequence[float]) -> torch.Tensor:
    """sum_i factors[i] tensors[i] of one shape, in fp32: a sum of differences, or with (1 - mu, mu) an interpolation.

    A tensor whose factor is 1 is exact where it is the only one whose factor is not 0.
    """
    summed = torch.zeros(tensors[0].shape)
    for tensor, factor in zip(tensors, factors, strict=True):
        if factor != 0:
            summed.add_(tensor.float(), alpha=factor)
    return summed


def flat_range(rows: Callable[[int, int], torch.Tensor], columns: int, start: int, stop: int) -> torch.Tensor:
    """Elements [start, stop) of a flattened matrix that only whole rows can be made of.

    Args:
        rows: (first, last) -> rows [last - first, columns].
    """
    first, last = start // columns, -(-stop // columns)
    return rows(first, last).reshape(-1)[start - first * columns : stop - first * columns]


def ties(deltas: Sequence[torch.Tensor], thresholds: Sequence[float]) -> torch.Tensor:
    """TIES: trim each difference to |d| >= its threshold, elect the sign of the sum, average what agrees with it.

    Zero where nothing agrees. `magnitude_threshold` finds the thresholds for a density.
    """
    trimmed = torch.stack(
        [torch.where(d.abs() >= t, d, 0.0) for d, t in zip((d.float() for d in deltas), thresholds, strict=True)]
    )
    elected = trimmed.sum(0).sign()
    agrees = (trimmed.sign() == elected) & (elected != 0)
    return (trimmed * agrees).sum(0) / agrees.sum(0).clamp(min=1)


def magnitude_threshold(pieces: Callable[[], Iterable[torch.Tensor]], density: float) -> float:
    """The magnitude that the `density` largest share of a tensor's elements reaches, exactly; two passes over it.

    Counts are kept by the upper, then by the lower 16 bits of the fp32 pattern, which orders magnitudes.

    Args:
        pieces: gives the tensor's pieces anew at each call.
        density: share in (0, 1]; of n elements at least ceil(density * n) are kept, more where several are equal.
    """

    def patterns() -> Iterable[np.ndarray]:
        return (p.float().abs().contiguous().view(-1).numpy().view(np.uint32) for p in pieces())

    def rank_of(counts: np.ndarray, wanted: int) -> tuple[int, int]:
        """The highest bin such that it and those above hold `wanted`, and how many of its own are still wanted."""
        above = np.cumsum(counts[::-1])
        steps = int(np.searchsorted(above, wanted))
        return len(counts) - 1 - steps, wanted - int(above[steps] - counts[len(counts) - 1 - steps])

    upper = np.zeros(1 << 16, np.int64)
    for pattern in patterns():
        upper += np.bincount(pattern >> 16, minlength=1 << 16)
    if not upper.any():
        return 0.0
    high, wanted = rank_of(upper, max(1, int(np.ceil(density * upper.sum()))))
    lower = np.zeros(1 << 16, np.int64)
    for pattern in patterns():
        lower += np.bincount(pattern[pattern >> 16 == high] & 0xFFFF, minlength=1 << 16)
    low, _ = rank_of(lower, wanted)
    return float(np.array([high << 16 | low], np.uint32).view(np.float32)[0])


def dare(delta: torch.Tensor, rate: float, seed: int, name: str, start: int = 0) -> torch.Tensor:
    """DARE: drop elements with probability `rate`, divide the others by 1 - rate; fp32.

    What is dropped depends on seed, tensor name and position alone.

    Args:
        delta: flat elements [start, start + numel) of tensor `name`.
    """
    kept = _uniform(f"dare:{seed}:{name}", start, delta.numel()) >= rate
    return delta.float() * kept / (1 - rate)


def random_signs(delta: torch.Tensor, seed: int, name: str, start: int = 0) -> torch.Tensor:
    """Every element with a sign drawn anew: as large as before, at random where it points; fp32.

    What is drawn depends on seed, tensor name and position alone.

    Args:
        delta: flat elements [start, start + numel) of tensor `name`.
    """
    negative = _uniform(f"signs:{seed}:{name}", start, delta.numel()) < 0.5
    return torch.where(negative, -delta.float(), delta.float())


def _uniform(stream: str, start: int, count: int) -> torch.Tensor:
    """Elements [start, start + count) of a stream of draws from [0, 1), fp32; the same however it is cut."""
    first = start // _DRAWN_TOGETHER
    blocks = range(first, -(-(start + count) // _DRAWN_TOGETHER))
    key = int.from_bytes(hashlib.sha256(stream.encode()).digest()[:8], "big")
    drawn = [np.random.Generator(np.random.Philox(key=[key, b])).random(_DRAWN_TOGETHER, np.float32) for b in blocks]
    return torch.from_numpy(
        np.concatenate([*drawn, np.empty(0, np.float32)])[start - first * _DRAWN_TOGETHER :][:count]
    )


def low_rank(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(left [m, r], right [r, n]), fp32, whose product is the best approximation of rank r of matrix [m, n] (SVD).

    Small matrices by the full SVD; beyond 4 ranks of width by the randomized one with 4 power iterations (Halko et al.
    2011), whose error is close to but not the optimum.
    """
    rank = min(rank, *matrix.shape)
    if 4 * rank >= min(matrix.shape):
        u, s, vh = torch.linalg.svd(matrix.float(), full_matrices=False)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            u, s, v = torch.svd_lowrank(matrix.float(), q=rank + 8, niter=4)
        vh = v.T
    root = s[:rank].sqrt()
    return u[:, :rank] * root, root[:, None] * vh[:rank]


def one_bit(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(signs, scales) of BitDelta (Liu et al. 2024, arXiv 2402.10193), a scale per row.

    Returns signs as bits, uint8 [m, ceil(n / 8)], 1 for >= 0, first column in the highest bit, and scales fp32 [m]:
    the mean magnitude of a row minimises the squared error.
    """
    signs = np.packbits(matrix.float().numpy() >= 0, axis=1)
    return torch.from_numpy(signs), matrix.float().abs().mean(1)


def from_one_bit(signs: torch.Tensor, scales: torch.Tensor, columns: int) -> torch.Tensor:
    """The matrix [m, columns] that signs and scales stand for: scale where the bit is 1, else -scale; fp32."""
    bits = torch.from_numpy(np.unpackbits(signs.numpy(), axis=1, count=columns))
    return (bits.float() * 2 - 1) * scales[:, None]
