"""Generation: a text to answer a prompt with, or each of an assistant's turns in a conversation.

A row has the columns "prompt" and "response", or "messages", a list of {role, content}. The loss is the cross-entropy
of the answers' tokens, mean over all of them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from pydantic import Field, model_validator

from recyclable.config.settings import Settings
from recyclable.data.bad_rows import BadRow
from recyclable.data.examples import TaskExamples
from recyclable.data.split import Split
from recyclable.tasks.parts.answers import of_answers
from recyclable.tasks.parts.cells import MESSAGES
from recyclable.tasks.parts.chat import last_turn
from recyclable.tasks.parts.columns import Column, Columns
from recyclable.tasks.parts.kind import Ask, Labels, Scores
from recyclable.tasks.parts.responses import Responses
from recyclable.tasks.parts.text_answers import TextAnswers
from recyclable.weights.generation_rules import SAMPLING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from recyclable.tasks.parts.files import Raw
    from recyclable.tasks.parts.task import Task


_DRAWN = (*SAMPLING, "seed")
"""What is read where tokens are drawn."""


class GenerationSettings(Settings):
    """What a task file of this kind may say."""

    max_new_tokens: int | None = Field(None, gt=0)
    """Tokens of a generated answer at most; null: as many as the longest response of train has, at most 256."""
    do_sample: bool = False
    """Draw the tokens of answers that are scored; else each is the likeliest one."""
    temperature: float = Field(1.0, gt=0)
    """What logits are divided by before tokens are drawn."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Draw only of the likeliest tokens that together have this probability."""
    top_k: int = Field(0, ge=0)
    """Draw only of the k likeliest tokens; 0: of all."""
    seed: int = Field(20, ge=0)
    """Decides, with an example's number in its split, what is drawn for it."""

    @model_validator(mode="after")
    def _read(self) -> GenerationSettings:
        if not self.do_sample:
            self.require_unset(_DRAWN, "without do_sample")
        return self


class Generation(TextAnswers):
    """A text that answers a prompt, or an assistant's turns in a conversation."""

    name: ClassVar[str] = "generation"
    assumed: ClassVar[bool] = True
    layouts: ClassVar[tuple[Columns, ...]] = (
        Columns(Column("prompt", "prompt"), None, Column("response", "response"), rank=1),
        Columns(Column("messages", "messages", MESSAGES), None, None, rank=1),
    )
    settings: ClassVar[type[Settings]] = GenerationSettings

    def read(self, given: Sequence[object] | None, raws: Mapping[str, Raw]) -> tuple[Labels, dict[str, Split]]:
        """No labels; prompts and responses, or conversations up to their last assistant turn, and what that says."""
        return (), {name: self._split(raw) for name, raw in raws.items()}

    def require_row(self, raw: Raw, at: int) -> None:
        """A conversation in which the assistant says something."""
        if not isinstance(raw.texts[at], str) and last_turn(raw.texts[at]) is None:
            problem = "no message is the assistant's, expected one at least: these are what is learnt"
            raise BadRow(raw.place(at), problem, "no assistant's message")

    def _split(self, raw: Raw) -> Split:
        if isinstance(raw.texts[0], str):
            return Split(raw.texts, None, raw.labels, raw.where, raw.places)
        texts, said = [], []
        for messages in raw.texts:
            last = last_turn(messages)
            assert last is not None, "required of every row"
            texts.append(messages[: last + 1])
            said.append(messages[last].get("content", ""))
        return Split(texts, None, said, raw.where, raw.places)

    def examples(self, split: Split, tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> Responses:
        """Prompts and responses in tokens."""
        return Responses(split, tokenizer, max_length)

    def examples_of(
        self, task: Task, split: Split, tokenizer: PreTrainedTokenizerBase, max_length: int | None
    ) -> Responses:
        """How long answers may be is told by the task file, or by train."""
        assert isinstance(task.settings, GenerationSettings)
        told = task.settings.model_dump()
        return Responses(split, tokenizer, max_length, told.pop("max_new_tokens"), task.splits.get("train"), told)

    def require_learnable(self, train: TaskExamples) -> None:
        """InputError where no token of a response is left, or none at which generation stops."""
        assert isinstance(train, Responses)
        train.require_learnable()

    def metrics(self, labels: Labels) -> tuple[str, ...]:
        """How likely responses are, or how much of them generated answers have."""
        return "log_likelihood", "exact_match", "f1", "rouge_l"

    def score(self, predictions: np.ndarray, targets: np.ndarray, labels: Labels) -> Scores:
        """log_likelihood, mean over all tokens of responses, and perplexity, from [N, 2]: summed ones, and tokens."""
        total, tokens = predictions.astype(np.float64).sum(0)
        mean = total / tokens if tokens else float("nan")
        return {"log_likelihood": float(mean), "perplexity": float(np.exp(-mean))}

    def scores(self, ask: Ask, examples: TaskExamples, labels: Labels, wanted: Collection[str] | None = None) -> Scores:
        """Beside those of `score` exact_match, f1 and rouge_l (`tasks.parts.answers`), of generated answers."""
        assert isinstance(examples, Responses)
        found = super().scores(ask, examples, labels, wanted)
        if wanted is None or not found.keys() >= set(wanted):
            answers = ask.generate(examples.prompts, examples.decoding, examples.rules)
            found |= of_answers(examples.decoded(answers), examples.references)
        return found

    def sampling_error(self, metric: str, predictions: np.ndarray, targets: np.ndarray) -> float | None:
        """Of the mean over all tokens, whose number differs from example to example: a ratio's, linearised."""
        total, tokens = predictions.astype(np.float64).T
        left = total - tokens * (total.sum() / max(1.0, tokens.sum()))
        return float(np.sqrt((left**2).sum()) / max(1.0, tokens.sum())) if metric == "log_likelihood" else None

    def knowing_nothing(self, train: Split, examples: TaskExamples, labels: Labels) -> Scores:
        """To whom every token of the vocabulary is as likely."""
        assert isinstance(examples, Responses)
        tokens = examples.labels.numpy().astype(np.float64)
        return self.scored(np.stack([-np.log(examples.vocabulary) * tokens, tokens], axis=1), tokens, labels)

    def mean_loss(self, predictions: np.ndarray, targets: np.ndarray) -> float:
        """Less `log_likelihood`."""
        return -self.score(predictions, targets, ())["log_likelihood"]
