"""Options behind their prompts, in tokens: the right one to be trained on, all of them to be asked about."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch

from recyclable.data.examples import Batch
from recyclable.data.order import Item
from recyclable.data.prompts import bare, continuations, prompt_tokens, shortened
from recyclable.data.token_rows import TokenRow
from recyclable.errors import InputError
from recyclable.tasks.parts.token_examples import TokenExamples

ROWS = "choice.rows"
"""Which row of a batch each option of an example is [B, O], -1 where it has no more."""
LENGTHS = "choice.lengths"
"""Characters of each option [B, O], 1 where there is none."""


class Options(TokenExamples):
    """Prompts (`texts`) with options (`pairs`), of which `labels` are the indices of the right ones.

    As in lm-eval, blanks at the end of a prompt belong to its options, since most tokenizers join a word with the blank
    before it; and no end token follows an option. Where `max_length` is too short for both, a prompt loses its
    beginning, the same for all of its options.
    """

    @cached_property
    def whole(self) -> list[tuple[list[int], list[list[int]]]]:
        """The prompt and the options of each example in tokens, uncut."""
        prompts = [text.rstrip() for text in self.split.texts]
        blanks = [text[len(text.rstrip()) :] for text in self.split.texts]
        behind = [blank + option for blank, of in zip(blanks, self.choices, strict=True) for option in of]
        before = [prompt for prompt, of in zip(prompts, self.choices, strict=True) for _ in of]
        told = bare(self.tokenizer, behind) if self.has_encoder else continuations(self.tokenizer, before, behind)
        for option, answer in zip(behind, told, strict=True):
            if not answer:
                raise InputError(self.tokenizer.name_or_path, f"makes no token of the option {option!r}")
        answers, read = iter(told), self._prompts(prompts)
        return [(prompt, [next(answers) for _ in of]) for prompt, of in zip(read, self.choices, strict=True)]

    @cached_property
    def options(self) -> list[list[TokenRow]]:
        """A row per option of each example, cut at `max_length`."""
        return [self._rows(self._cut(prompt, answers), answers) for prompt, answers in self.whole]

    @property
    def choices(self) -> list[list[str]]:
        """The options of each example, as they are written."""
        assert self.split.pairs is not None, "what is to be chosen from"
        return self.split.pairs

    @cached_property
    def rows(self) -> list[TokenRow]:
        """The right options."""
        return [of[right] for of, right in zip(self.options, self.split.labels, strict=True)]

    @property
    def read_rows(self) -> list[TokenRow]:
        """All options."""
        return [row for of in self.options for row in of]

    @cached_property
    def labels(self) -> torch.Tensor:
        """Indices of the right options [N]."""
        return torch.tensor(self.split.labels)

    @property
    def asked(self) -> EveryOption:
        """All options of each example."""
        return EveryOption(self)

    @property
    def remark(self) -> str | None:
        """How many prompts are cut, and how many options."""
        cut = sum(len(self._cut(prompt, answers)) < len(prompt) for prompt, answers in self.whole)
        pairs = [
            pair
            for rows, (_, whole) in zip(self.options, self.whole, strict=True)
            for pair in zip(rows, whole, strict=True)
        ]
        short = sum(len(row.told) < len(answer) for row, answer in pairs)
        if not (cut or short):
            return None
        ends = f", {short} of {len(pairs)} options their end" if short else ""
        return f"{cut} of {len(self)} prompts lose their beginning at max_length {self.max_length}{ends}"

    def _prompts(self, prompts: list[str]) -> list[list[int]]:
        if self.has_encoder:
            return self.tokenizer(prompts, verbose=False)["input_ids"]
        return prompt_tokens(self.tokenizer, prompts)

    def _cut(self, prompt: list[int], answers: list[list[int]]) -> list[int]:
        """A prompt's last tokens, as many as fit beside the longest option."""
        if self.max_length is None:
            return prompt
        longest = 0 if self.has_encoder else max(map(len, answers))
        return shortened(prompt, self.max_length - longest, self.around)

    def _rows(self, prompt: list[int], answers: list[list[int]]) -> list[TokenRow]:
        if self.has_encoder:
            return [self.answered(prompt, answer[: self.max_length]) for answer in answers]
        rows = [[*prompt, *answer][: self.max_length] for answer in answers]
        return [TokenRow(ids, range(len(prompt), len(ids))) for ids in rows]


class EveryOption:
    """The same examples, of which a model is asked about all options: up to O rows of a batch for each.

    O: the most options that an example of the split has.
    """

    def __init__(self, examples: Options) -> None:
        self._examples = examples
        self._most = max(map(len, examples.options))

    def __len__(self) -> int:
        return len(self._examples)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of the longest option: what a batch pads all others to."""
        return np.array([max(map(len, of)) for of in self._examples.options])

    def batch(self, items: list[Item]) -> Batch:
        """Rows of all options, and which is which."""
        chosen = [index for _, index in items]
        groups = [self._examples.options[index] for index in chosen]
        rows, lengths = torch.full((len(items), self._most), -1), torch.ones(len(items), self._most)
        count = 0
        for number, (index, group) in enumerate(zip(chosen, groups, strict=True)):
            rows[number, : len(group)] = torch.arange(count, count + len(group))
            lengths[number, : len(group)] = torch.tensor([len(text) for text in self._examples.choices[index]])
            count += len(group)
        padded = self._examples.padded([row for group in groups for row in group])
        return {**padded, ROWS: rows, LENGTHS: lengths}
