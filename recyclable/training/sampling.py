"""Draws tokens by the Gumbel-max trick, with noise that is known from seed, prompt, step and token alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from recyclable.weights.sources import seed_of

_GOLDEN = -7046029254386353131  # 2^64 / golden ratio, as a signed number; with the two below SplitMix64's constants
_FIRST, _SECOND = -4658895280553007687, -7723592293110705685


def drawing(numbers: Sequence[int], seed: int, temperature: float, top_k: int, top_p: float) -> LogitsProcessorList:
    """Turns logits [B, V] into scores whose largest is a token drawn from what temperature, top-k and top-p leave.

    Args:
        numbers: the prompt's number among all, of each row.
        top_k: 0 leaves all tokens; so does a `top_p` of 1.
    """
    made = [TemperatureLogitsWarper(temperature)] if temperature != 1.0 else []
    made += [TopKLogitsWarper(top_k)] if top_k else []
    made += [TopPLogitsWarper(top_p)] if top_p < 1.0 else []
    return LogitsProcessorList([*made, GumbelNoise(numbers, seed)])


class GumbelNoise(LogitsProcessor):
    """Adds Gumbel noise to scores: the largest sum is at token i with probability softmax(scores)_i.

    That is the Gumbel-max trick (Gumbel 1954; Maddison et al. 2014, arXiv 1411.0030). Whoever samples from a generator
    that all rows of a batch take their numbers from, as transformers does, draws other tokens with other batches or
    ranks. Here the noise of a token is a function of seed, prompt, step and token, so a prompt gets the same answer
    wherever and with whomever it is asked, and greedy search over the sums does the drawing.

    The uniform numbers are those of SplitMix64 (Steele et al. 2014, doi 10.1145/2660193.2660195), one stream for each
    prompt and step, in integers and therefore alike on all devices; the noise is computed in fp64.

    Args:
        numbers: the prompt's number among all, of each row.
    """

    def __init__(self, numbers: Sequence[int], seed: int) -> None:
        self._numbers, self._seed, self._step = numbers, seed, 0

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.Tensor:
        streams = [seed_of(self._seed, f"prompt {number} step {self._step}") for number in self._numbers]
        self._step += 1
        rows, tokens = torch.where(scores > -torch.inf)  # the others are never drawn
        uniform = _uniform(torch.tensor(streams, device=scores.device)[rows] + (tokens + 1) * _GOLDEN)
        noisy = torch.full_like(scores, -torch.inf, dtype=torch.float64)
        noisy[rows, tokens] = scores[rows, tokens].double() - torch.log(-torch.log(uniform))
        return noisy


def _uniform(state: torch.Tensor) -> torch.Tensor:
    """SplitMix64's output of each state (int64, overflowing), as fp64 inside of (0, 1)."""
    mixed = (state ^ _shifted(state, 30)) * _FIRST
    mixed = (mixed ^ _shifted(mixed, 27)) * _SECOND
    return (_shifted(mixed ^ _shifted(mixed, 31), 12).double() + 0.5) * 2.0**-52


def _shifted(bits: torch.Tensor, by: int) -> torch.Tensor:
    """Moved right, zeros moving in."""
    return (bits >> by) & (2 ** (64 - by) - 1)
