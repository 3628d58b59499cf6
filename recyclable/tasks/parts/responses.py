"""Prompts and their responses, or conversations, in tokens: only what answers is to be told.

Conventions: a prompt and its response are joined as they stand, as TRL and lm-eval do, and the tokenizer's end token
follows; a conversation is written by the chat template (`tasks.parts.chat`), and each assistant turn is told up to the
token at which generation stops, which templates may write something behind.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from types import MappingProxyType
from typing import Any, NamedTuple, Self

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from recyclable.data.decoding import Decoding
from recyclable.data.prompts import continuations, prompt_tokens, shortened
from recyclable.data.split import Split
from recyclable.data.token_rows import TokenRow
from recyclable.errors import InputError
from recyclable.tasks.parts.chat import written
from recyclable.tasks.parts.token_examples import TokenExamples
from recyclable.weights.generation_file import FILE
from recyclable.weights.generation_rules import end_tokens

MOST_NEW_TOKENS = 256


class Whole(NamedTuple):
    """An example before anything is cut."""

    row: TokenRow
    begin: int
    """Where its (last) answer begins among the row's tokens."""

    @property
    def prompt(self) -> list[int]:
        """What that is generated from: a decoder goes on from it, an encoder reads it."""
        return self.row.ids[: self.begin] if self.row.source is None else self.row.source

    @property
    def answer(self) -> list[int]:
        """That answer, as it should be."""
        return self.row.ids[self.begin :]


class Responses(TokenExamples):
    """Texts with responses, or conversations with assistant turns.

    Args:
        split: `texts` are prompts and `labels` their responses; or texts are conversations.
        max_new_tokens: of a generated answer; None: as many as the longest answer in `train` has, at most 256, and
            less where the model has no positions for them.
        train: the training examples; None: these are.
        sampling: what `data.decoding.Decoding` has beside; nothing: answers are greedy.
    """

    def __init__(
        self,
        split: Split,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int | None,
        max_new_tokens: int | None = None,
        train: Split | None = None,
        sampling: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        super().__init__(split, tokenizer, max_length)
        self._most, self._train, self._sampling = max_new_tokens, train, dict(sampling)

    @cached_property
    def whole(self) -> list[Whole]:
        """All examples, uncut."""
        if isinstance(self.split.texts[0], str):
            return self._paired(self.split.texts, self.split.labels)
        return self._conversations()

    @cached_property
    def rows(self) -> list[TokenRow]:
        """Cut at `max_length`: what lies beyond is neither read nor told."""
        return [self._cut(whole.row) for whole in self.whole]

    @cached_property
    def labels(self) -> torch.Tensor:
        """How many tokens of each are to be told [N]."""
        return torch.tensor([len(row.told) for row in self.rows])

    @property
    def remark(self) -> str | None:
        """How many responses are cut."""
        pairs = [(len(row.told), len(whole.row.told)) for row, whole in zip(self.rows, self.whole, strict=True)]
        if not (cut := sum(left < all_of for left, all_of in pairs)):
            return None
        empty = sum(left == 0 for left, _ in pairs)
        return f"{cut} of {len(self)} responses are cut at max_length {self.max_length}, {empty} of them wholly"

    @property
    def prompts(self) -> list[list[int]]:
        """What each (last) answer is generated from, in tokens; without the beginning where positions are too few."""
        prompts = [whole.prompt for whole in self.whole]
        if self.limit is None:
            return prompts
        most = self.limit if self.has_encoder else self.limit - self.max_new_tokens
        return [shortened(prompt, most, self.around) for prompt in prompts]

    @property
    def references(self) -> list[str]:
        """The (last) answers that there should be; of a conversation as its template writes them."""
        if isinstance(self.split.texts[0], str):
            return self.split.labels
        return self.decoded([whole.answer for whole in self.whole])

    @property
    def decoding(self) -> Decoding:
        """How an answer's tokens are chosen."""
        return Decoding(self.max_new_tokens, **self._sampling)

    @cached_property
    def max_new_tokens(self) -> int:
        """How many tokens an answer may have."""
        if self._most is not None:
            return self._most
        if self._train is None or self._train is self.split:
            longest = max(len(whole.answer) for whole in self.whole)
            return min(MOST_NEW_TOKENS, longest, self._room or MOST_NEW_TOKENS)
        train = Responses(self._train, self.tokenizer, None)
        train.config, train.prompted = self.config, self.prompted
        return train.max_new_tokens

    @property
    def _room(self) -> int | None:
        """Positions for an answer, beside the least prompt that there is."""
        return self.limit and self.limit - (not self.has_encoder)

    def readable_by(self, config: PretrainedConfig, prompts: int = 0) -> Self:
        """As for all tokens; InputError also where the model has no positions for the answers that are wanted."""
        read = super().readable_by(config, prompts)
        if self._most is not None and read._room is not None and self._most > read._room:
            problem = f"is {self._most}, but {config.name_or_path} has positions for {read.limit} tokens"
            raise InputError("max_new_tokens", problem)
        return read

    def decoded(self, answers: Sequence[Sequence[int]]) -> list[str]:
        """Answers in tokens as texts, without special tokens."""
        return [self.tokenizer.decode(answer, skip_special_tokens=True) for answer in answers]

    def require_learnable(self) -> None:
        """InputError where training on them would teach nothing, or not when to stop."""
        told = {token for row in self.rows for token in row.targets}
        if not told:
            problem = f"is {self.max_length}, which leaves no token of any response in train to learn from"
            raise InputError("max_length", problem)
        stops = end_tokens(self.rules)
        if told.isdisjoint(stops):
            whole = {token for whole in self.whole for token in whole.row.targets}
            if not whole.isdisjoint(stops):
                problem = f"is {self.max_length}, which cuts the end off every response in train"
                raise InputError("max_length", f"{problem}: the model would never learn to stop")
            self._raise_unstopped(stops)

    def _raise_unstopped(self, stops: Sequence[int]) -> None:
        names = ", ".join(map(repr, self.tokenizer.convert_ids_to_tokens(list(stops)))) or "no token"
        end = self.tokenizer.decode(self.whole[0].row.targets[-1:])
        place = f"{self.config.name_or_path if self.config else self.tokenizer.name_or_path}"
        problem = f"generation stops at {names}, but no response in train has that: the first ends with {end!r}"
        hint = f"expected a chat template that ends assistant turns so, or its end token as eos_token_id in {FILE}"
        raise InputError(place, f"{problem}; {hint}")

    def _paired(self, prompts: list[str], responses: list[str]) -> list[Whole]:
        if (end := self.tokenizer.eos_token_id) is None:
            problem = "its tokenizer has no end token (eos_token), which follows a response so that generation stops"
            raise InputError(self.tokenizer.name_or_path, problem)

        def ended(ids: list[int]) -> list[int]:
            return ids if ids[-1:] == [end] else [*ids, end]

        if self.has_encoder:
            cut = {"truncation": self.max_length is not None, "max_length": self.max_length}
            sources = self.tokenizer(prompts, **cut)["input_ids"]
            answers = [ended(ids) for ids in self.tokenizer(text_target=responses, verbose=False)["input_ids"]]
            return [Whole(self.answered(source, one), 1) for source, one in zip(sources, answers, strict=True)]
        befores = prompt_tokens(self.tokenizer, prompts)
        answers = [ended(ids) for ids in continuations(self.tokenizer, prompts, responses)]
        return [_continued(before, answer) for before, answer in zip(befores, answers, strict=True)]

    def _conversations(self) -> list[Whole]:
        split, found = self.split, []
        places = [split.place(index) for index in range(len(split))]
        for place, (ids, turns) in zip(places, written(self.tokenizer, split.texts, places), strict=True):
            ends = [self._end_of(ids, begin, end) for begin, end in turns]
            begin, end = turns[-1][0], ends[-1]
            if not self.has_encoder:
                told = [at for (first, _), last in zip(turns, ends, strict=True) for at in range(max(1, first), last)]
                found.append(Whole(TokenRow(ids[:end], told), begin))
            elif len(turns) == 1:
                source = ids[:begin] if self.max_length is None else ids[:begin][-self.max_length :]
                found.append(Whole(self.answered(source, ids[begin:end]), 1))
            else:
                problem = f"has {len(turns)} assistant turns, expected one: an encoder-decoder answers once"
                raise InputError(place, problem)
        return found

    def _end_of(self, ids: list[int], begin: int, end: int) -> int:
        """Behind the last token of a turn at which generation stops; where there is none, of the turn."""
        stops = end_tokens(self.rules)
        return next((at + 1 for at in range(end - 1, begin - 1, -1) if ids[at] in stops), end)

    def _cut(self, row: TokenRow) -> TokenRow:
        if self.max_length is None:
            return row
        most = self.max_length if row.source is None else self.max_length + 1  # the token that begins it is no answer's
        if len(row.ids) <= most:
            return row
        return TokenRow(row.ids[:most], [place for place in row.told if place < most], row.source)


def _continued(before: list[int], answer: list[int]) -> Whole:
    ids = before + answer
    return Whole(TokenRow(ids, range(len(before), len(ids))), len(before))
