"""Has a decoder or encoder-decoder continue prompts, shared out to the ranks, and brings the answers together."""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from peft import PeftModel
from torch import nn
from tqdm import tqdm
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from recyclable import distributed
from recyclable.data.examples import Batch
from recyclable.training.evaluation import shares
from recyclable.training.sampling import drawing
from recyclable.training.zero import is_partitioned
from recyclable.weights.generation_rules import end_tokens, looks_at_padding
from recyclable.weights.team import Team

Prompts = Sequence[Sequence[int]]
"""Token ids of each, at least one."""


@dataclass(frozen=True)
class Decoding:
    """How tokens are chosen: the likeliest one, or drawn from what temperature, top-k and top-p leave."""

    max_new_tokens: int
    """An answer is cut there."""
    do_sample: bool = False
    """Draw tokens. All below is for that."""
    temperature: float = 1.0
    top_k: int = 0
    """Only the k likeliest tokens; 0 leaves all."""
    top_p: float = 1.0
    """Only the likeliest tokens that together have this probability."""
    seed: int = 0


def generate(
    model: nn.Module,
    prompts: Prompts,
    decoding: Decoding,
    rules: GenerationConfig,
    batch_size: int,
    device: torch.device | str = "cpu",
    team: Team | None = None,
) -> list[list[int]]:
    """The tokens that each prompt is answered with, in the prompts' order, on every rank; without the end token.

    transformers' own `generate`, with a key-value cache. A decoder continues its prompts, padded on the left; an
    encoder-decoder reads them with its encoder. The answers depend neither on the batch size nor on the number of
    ranks, sampled ones no more than greedy ones (`training.sampling.GumbelNoise`), but for the rounding of ties.

    A model that is partitioned under ZeRO-3 gathers parameters in each forward pass, so every rank makes as many of
    them as the others: a rank whose answers are complete runs on idle, one without prompts repeats one of the others'.

    Args:
        model: plain or with an adapter, in evaluation mode, whole on this rank or partitioned.
        rules: `weights.generation_rules.generation_rules` of the base.
        batch_size: prompts per rank.
        team: None: all ranks; `weights.team.ALONE` for a rank that has a model of its own to ask.
    """
    team = team or distributed.Ranks()
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    left, rules = not base.config.is_encoder_decoder, copy.copy(rules)
    rules.max_new_tokens = decoding.max_new_tokens
    groups = _of_one_length if looks_at_padding(rules) or (left and _has_prompts(model)) else _of_any_length
    synced, own = team.size > 1 and is_partitioned(model), {}
    quiet = team.rank > 0 or not sys.stderr.isatty()
    with (
        warnings.catch_warnings(),
        patch.object(base, "generation_config", rules),  # of which transformers would take whatever `rules` lacks
        tqdm(total=len(prompts), desc="generate", unit="prompt", disable=quiet) as bar,
    ):
        warnings.filterwarnings("ignore", "Position ids are not supported")  # by prompts, which are not padded here
        for places, real in chain.from_iterable(shares(rows, batch_size, team) for rows in groups(prompts)):
            inputs = _padded([prompts[place] for place in places], rules, left)
            told = model.generate(
                **{name: tensor.to(device) for name, tensor in inputs.items()},
                generation_config=rules,
                logits_processor=_processors(decoding, places, bar),
                synced_gpus=synced,
            )
            begin = inputs["input_ids"].shape[1] if left else 1
            answers = (_cut(row, rules) for row in told[:real, begin:].tolist())
            own.update(zip(places[:real].tolist(), answers, strict=True))
            bar.update(min(len(places) * team.size, len(prompts) - bar.n))
    found = dict(chain.from_iterable(part.items() for part in team.gather(own)))
    return [found[place] for place in range(len(prompts))]


def _of_any_length(prompts: Prompts) -> list[np.ndarray]:
    """All prompts' places, those of like length side by side."""
    return [np.argsort([len(prompt) for prompt in prompts], kind="stable")]


def _of_one_length(prompts: Prompts) -> list[np.ndarray]:
    """The places of prompts that need no padding in a batch."""
    lengths = np.array([len(prompt) for prompt in prompts])
    return [np.flatnonzero(lengths == length) for length in np.unique(lengths)]


def _has_prompts(model: nn.Module) -> bool:
    """Whether an adapter puts prompts of its own before a text: PEFT puts them before the padding, which parts them."""
    return isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning


def _padded(prompts: Prompts, rules: GenerationConfig, left: bool) -> Batch:
    """Input and attention mask [B, L], real tokens on the right or on the left."""
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), rules.pad_token_id)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        real = slice(longest - len(prompt), None) if left else slice(len(prompt))
        ids[row, real], mask[row, real] = torch.tensor(prompt), 1
    return {"input_ids": ids, "attention_mask": mask}


def _processors(decoding: Decoding, places: np.ndarray, bar: tqdm) -> LogitsProcessorList:
    told = LogitsProcessorList([_Told(bar, decoding.max_new_tokens)])
    if decoding.do_sample:
        told += drawing(places.tolist(), decoding.seed, decoding.temperature, decoding.top_k, decoding.top_p)
    return told


class _Told(LogitsProcessor):
    """Changes nothing, and tells a person which token of a batch's answers is being chosen."""

    def __init__(self, bar: tqdm, most: int) -> None:
        self._bar, self._most, self._step = bar, most, 0

    def __deepcopy__(self, memo: dict[int, Any]) -> _Told:
        return self  # PEFT copies all that it hands on, and bars have locks

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        self._step += 1
        self._bar.set_postfix_str(f"token {self._step} of {self._most} at most")
        return scores


def _cut(answer: list[int], rules: GenerationConfig) -> list[int]:
    """An answer up to its end token; padding follows that where others went on."""
    ends = end_tokens(rules)
    return answer[: next((place for place, token in enumerate(answer) if token in ends), None)]
