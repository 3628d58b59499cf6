"""Has a decoder or encoder-decoder continue prompts, shared out to the ranks, and brings the answers together."""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, takewhile
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from peft import PeftModel
from torch import nn
from tqdm import tqdm
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from recyclable import distributed
from recyclable.data.decoding import Decoding
from recyclable.data.examples import Batch
from recyclable.objectives.objective import Ask
from recyclable.training.evaluation import shares, to_device
from recyclable.training.sampling import drawing
from recyclable.training.zero import each_layer_alone, is_partitioned
from recyclable.weights.generation_rules import end_tokens, looks_at_padding
from recyclable.weights.team import Team

Prompts = Sequence[Sequence[int]]
"""Token ids of each, at least one."""


class Generating(nn.Module):
    """A model to generate with, as an engine's module (`training.engine.frozen`)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch, ask: Ask) -> Any:
        """As `objectives.objective.Objective` is asked."""
        return ask(self.model)


def generate(
    answers: Callable[..., Any],
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
    ranks, sampled ones no more than greedy ones (`training.sampling.GumbelNoise`), but for ties that rounding decides.

    A model that is partitioned under ZeRO-3 gathers parameters in each forward pass, so every rank makes as many of
    them as the others: one whose answers are complete runs on idle, one without prompts repeats one of the others'.

    Args:
        answers: `answers({}, ask=work)` does `work` with a model, plain or with an adapter, in evaluation: a module
            such as `Generating`, or an engine around it.
        rules: of the model (`weights.generation_rules.rules_of`).
        batch_size: prompts per rank.
        team: None: all ranks; `weights.team.ALONE` for a rank that has a model of its own to ask.
    """
    team = team or distributed.Ranks()
    # in a tuple: ZeRO-3 looks for tensors in what a forward gives, and warns of types that it does not know
    (plan,) = answers({}, ask=lambda model: (_Plan.of(model, decoding, rules, team),))
    groups = _of_any_length(prompts) if plan.pads else _of_one_length(prompts)
    quiet = team.rank > 0 or not sys.stderr.isatty()
    own: dict[int, list[int]] = {}
    with (
        each_layer_alone(answers),
        tqdm(total=len(prompts), desc="generate", unit="prompt", disable=quiet) as bar,
    ):
        for places, real in chain.from_iterable(shares(group, batch_size, team) for group in groups):
            inputs = to_device(plan.padded([prompts[place] for place in places]), device)
            told = answers({}, ask=partial(plan.answers, inputs=inputs, chosen_by=_processors(decoding, places, bar)))
            own.update(zip(places[:real].tolist(), told[:real], strict=True))
            bar.update(min(len(places) * team.size, len(prompts) - bar.n))
    found = dict(chain.from_iterable(part.items() for part in team.gather(own)))
    return [found[place] for place in range(len(prompts))]


@dataclass(frozen=True)
class _Plan:
    """How a model is asked."""

    rules: GenerationConfig
    left: bool
    """A decoder, whose prompts are padded on the left."""
    pads: bool
    """Prompts of unequal length may share a batch: no answer depends on the padding."""
    synced: bool
    """Ranks make their forward passes together."""

    @classmethod
    def of(cls, model: nn.Module, decoding: Decoding, rules: GenerationConfig, team: Team) -> _Plan:
        left, rules = not _plain(model).config.is_encoder_decoder, copy.copy(rules)
        rules.max_new_tokens = decoding.max_new_tokens
        # PEFT puts an adapter's prompts before the padding, which parts them from the text.
        apart = left and isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning
        pads = not (apart or looks_at_padding(rules))
        return cls(rules, left, pads, synced=team.size > 1 and is_partitioned(model))

    def padded(self, prompts: Prompts) -> Batch:
        """Input and attention mask [B, L]."""
        longest = max(map(len, prompts))
        ids = torch.full((len(prompts), longest), self.rules.pad_token_id)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            real = slice(longest - len(prompt), None) if self.left else slice(len(prompt))
            ids[row, real], mask[row, real] = torch.tensor(prompt), 1
        return {"input_ids": ids, "attention_mask": mask}

    def answers(self, model: Any, inputs: Batch, chosen_by: LogitsProcessorList) -> list[list[int]]:
        """Of each row, up to its end token; padding follows that where others went on."""
        with (
            warnings.catch_warnings(),
            patch.object(_plain(model), "generation_config", self.rules),  # which else adds what these lack
        ):
            warnings.filterwarnings("ignore", "Position ids are not supported")  # PEFT's prompts, never padded here
            told = model.generate(
                **inputs, generation_config=self.rules, logits_processor=chosen_by, synced_gpus=self.synced
            )
        begin, ends = inputs["input_ids"].shape[1] if self.left else 1, end_tokens(self.rules)
        return [list(takewhile(lambda token: token not in ends, row)) for row in told[:, begin:].tolist()]


def _plain(model: Any) -> PreTrainedModel:
    """The transformers model, below an adapter."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _of_any_length(prompts: Prompts) -> list[np.ndarray]:
    """All prompts' places, those of like length side by side."""
    return [np.argsort([len(prompt) for prompt in prompts], kind="stable")]


def _of_one_length(prompts: Prompts) -> list[np.ndarray]:
    """The places of prompts that need no padding in a batch."""
    lengths = np.array([len(prompt) for prompt in prompts])
    return [np.flatnonzero(lengths == length) for length in np.unique(lengths)]


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
