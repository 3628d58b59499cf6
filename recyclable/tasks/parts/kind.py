"""What every kind of task is: how its rows are read, what a model says of an example, its losses and its scores.

Shapes: B examples of a batch, N of a split, ... what an example is asked about (nothing more, or words), C classes, K
classes that a teacher tells, R rows: everything that was asked about, one below the other.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np
import torch
from torch.nn import functional as F

from recyclable.config.settings import Settings
from recyclable.data.decoding import Decoding
from recyclable.data.examples import Batch, TaskExamples
from recyclable.data.token_rows import full_batch
from recyclable.tasks.parts.columns import Columns

if TYPE_CHECKING:
    from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

    from recyclable.data.split import Split
    from recyclable.tasks.parts.files import Raw
    from recyclable.tasks.parts.task import Task

Labels = tuple[str, ...]
Scores = dict[str, float]


class Ask(Protocol):
    """A model that is asked about examples; every rank is told all answers, in the examples' order."""

    def predict(self, examples: TaskExamples) -> np.ndarray:
        """Predictions [N, ..., C] (fp32)."""
        ...

    def generate(
        self, prompts: Sequence[Sequence[int]], decoding: Decoding, rules: GenerationConfig
    ) -> list[list[int]]:
        """What it answers to each prompt (an encoder-decoder's encoder reads it); token ids, up to the stop
        token, which is left out.

        Args:
            rules: of the model (`weights.generation_rules.rules_of`).
        """
        ...


class TaskKind(ABC):
    """A kind of task. It has no state: whatever it is asked about is given."""

    name: ClassVar[str]
    """As `problem` in task files and manifests."""
    layouts: ClassVar[tuple[Columns, ...]] = (Columns(),)
    """The columns it reads: each of these is one way to have them."""
    settings: ClassVar[type[Settings]] = Settings
    """What it reads of a task file beside names of columns."""
    model_class: ClassVar[str] = "SequenceClassification"
    """transformers' AutoModelFor... that has the head."""
    task_type: ClassVar[str] = "SEQ_CLS"
    """PEFT's name for the kind."""
    problem_type: ClassVar[str | None] = None
    """As configs of transformers call it, where its class of models is for several kinds of problems."""
    has_labels: ClassVar[bool] = True
    """Whether its targets are of classes with names."""
    over_vocabulary: ClassVar[bool] = False
    """Whether its answers are text, told by the language-model head: losses are those of chosen tokens then."""
    assumed: ClassVar[bool] = False
    """Whether weights with its head are taken to be for it where nobody says for which of several kinds they are."""
    exclusive: ClassVar[bool] = True
    """Whether one class at most is right: a teacher may then tell only the likeliest, the others being impossible."""

    @classmethod
    def column_keys(cls) -> list[str]:
        """The keys of a task file that name its columns."""
        return list(dict.fromkeys(key for layout in cls.layouts for key in layout.keys))

    @classmethod
    def explained(cls) -> list[dict[str, Any]]:
        """Each key of a task file that it reads beside those of all kinds, as `config.settings.Settings.explained`."""
        columns = [column for layout in cls.layouts for column in layout.every]
        names = {key: dict.fromkeys(one.name for one in columns if one.key == key) for key in cls.column_keys()}
        told = {"type": "str", "required": False, "about": "the column's name in the files"}
        return [
            *({"name": key, "default": " or ".join(found), **told} for key, found in names.items()),
            *cls.settings.explained(),
        ]

    def model_class_for(self, config: PretrainedConfig) -> str:
        """transformers' AutoModelFor... of a base with this config."""
        if not self.over_vocabulary:
            return self.model_class
        return "Seq2SeqLM" if config.is_encoder_decoder else "CausalLM"

    def task_type_for(self, config: PretrainedConfig) -> str:
        """PEFT's name for the kind on such a base."""
        if not self.over_vocabulary:
            return self.task_type
        return "SEQ_2_SEQ_LM" if config.is_encoder_decoder else "CAUSAL_LM"

    @abstractmethod
    def claims(self, train: Raw) -> int:
        """How sure it is that rows that name no problem are its own: 0 not at all; the surest kind takes them."""

    @abstractmethod
    def read(self, given: Sequence[object] | None, raws: Mapping[str, Raw]) -> tuple[Labels, dict[str, Split]]:
        """Labels in order, and the splits, from rows as files have them, each of which `require_row` let pass.

        Args:
            given: the task file's `labels`, or those that the files declare.

        Raises InputError for labels that are none.
        """

    def require_row(self, raw: Raw, at: int) -> None:
        """BadRow where a row of a split, by its index, is no example of this kind, whatever the others are.

        A kind that reads rows otherwise than the one that it is derived from judges them otherwise, too.
        """
        return

    def __init_subclass__(cls, **more: Any) -> None:
        super().__init_subclass__(**more)
        if "read" in vars(cls) and "require_row" not in vars(cls):
            cls.require_row = TaskKind.require_row  # type: ignore[method-assign]

    def moved(self, targets: list[Any], places: Sequence[int]) -> list[Any]:
        """Targets of a split when class i has become class `places[i]`; here indices, or lists of them."""
        return [self.moved(one, places) if isinstance(one, list) else places[one] for one in targets]

    @abstractmethod
    def strata(self, split: Split) -> list[int]:
        """The group of each example, of which few-shot samples hold equally many."""

    @abstractmethod
    def stratum_name(self, stratum: int, labels: Labels) -> str:
        """What such a group is called in messages; empty where it is the whole split, which is called as the task."""

    @abstractmethod
    def examples(self, split: Split, tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> TaskExamples:
        """The split, tokenised; batches have `labels` [B, ...].

        Args:
            max_length: tokens that a text is cut to; None: no text is cut.
        """

    def examples_of(
        self, task: Task, split: Split, tokenizer: PreTrainedTokenizerBase, max_length: int | None
    ) -> TaskExamples:
        """One of a task's splits, tokenised; here nothing else of the task matters."""
        return self.examples(split, tokenizer, max_length)

    def require_learnable(self, train: TaskExamples) -> None:
        """InputError where training on these would teach nothing; here they always do."""
        return

    def set_labels(self, config: PretrainedConfig, labels: Sequence[str]) -> None:
        """Make a config one of a model with a head for these labels (none: one number), of this kind and no other.

        A language-model head has no labels: its config stays as it is.
        """
        if self.over_vocabulary:
            return
        names = list(labels) or ["value"]
        config.num_labels, config.id2label = len(names), dict(enumerate(names))
        config.problem_type = self.problem_type  # and not that of the task which a base may have been tuned for
        config.label2id = {label: i for i, label in enumerate(names)}

    def answers(self, logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        """What a model says of each example [B, ..., C], from its logits."""
        return logits

    def rows(self, values: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Those of [B, ..., K] that losses are made of [R, K]."""
        return values

    def targets(self, batch: Batch) -> torch.Tensor:
        """The labels of `rows` [R]."""
        return batch["labels"]

    def count(self, batch: Batch) -> int:
        """R, known from the batch alone."""
        return len(batch["labels"])

    def full_batch(self, rows: int, length: int, labels: int, config: PretrainedConfig) -> Batch:
        """The largest batch of so many rows, for who asks what it would take; its values mean nothing.

        Args:
            length: tokens that a text is cut to.
            labels: how many classes there are.
            config: of the model that reads it.
        """
        if self.over_vocabulary:
            return full_batch(rows, length, bool(config.is_encoder_decoder))
        ids = torch.zeros(rows, length, dtype=torch.long)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **self.full_targets(rows, length, labels)}

    def full_targets(self, rows: int, length: int, labels: int) -> Batch:
        """What such a batch has beside its texts."""
        return {"labels": torch.zeros(rows, dtype=torch.long)}

    @abstractmethod
    def loss_sum(self, rows: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Summed loss of logits [R, C] against targets [R], in fp32."""

    def divergence_sum(
        self, student: torch.Tensor, teacher: torch.Tensor, temperature: float, classes: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Sum over rows of KL(teacher/T || student/T), logits [R, C] and [R, K], computed in fp32.

        Args:
            classes: the classes that the teacher's logits are of [R, K]; all others have probability zero.
        """
        student_log = F.log_softmax(student.float() / temperature, dim=-1)
        if classes is not None:
            student_log = student_log.gather(-1, classes)
        teacher_log = F.log_softmax(teacher.float() / temperature, dim=-1)
        return F.kl_div(student_log, teacher_log, reduction="sum", log_target=True)

    @abstractmethod
    def metrics(self, labels: Labels) -> tuple[str, ...]:
        """Scores that can select the best step, the usual one first: of all of them more is better."""

    @abstractmethod
    def score(self, predictions: np.ndarray, targets: np.ndarray, labels: Labels) -> Scores:
        """Scores of predictions [N, ..., C] against targets [N, ...]."""

    def scores(self, ask: Ask, examples: TaskExamples, labels: Labels, wanted: Collection[str] | None = None) -> Scores:
        """Scores of a model on examples; a collective.

        Args:
            ask: the model.
            wanted: at least these; None: all that the kind has, whatever they cost.
        """
        return self.score(ask.predict(examples), examples.labels.numpy(), labels)

    def mean_loss(self, predictions: np.ndarray, targets: np.ndarray) -> float:
        """Mean loss of predictions [N, ..., C] against targets [N, ...]."""
        asked = self.asked(targets)
        rows, wanted = (torch.from_numpy(np.ascontiguousarray(values[asked])) for values in (predictions, targets))
        return float(self.loss_sum(rows, wanted)) / max(1, wanted.numel())

    def asked(self, targets: np.ndarray) -> np.ndarray:
        """Which of the examples, or their words, [N, ...] the model was asked about, from the targets."""
        return np.ones(targets.shape, bool)

    def scored(self, predictions: np.ndarray, targets: np.ndarray, labels: Labels) -> Scores:
        """`loss`, the mean one, and the scores of predictions [N, ..., C] against targets [N, ...]."""
        return {"loss": self.mean_loss(predictions, targets), **self.score(predictions, targets, labels)}

    def sampling_error(self, metric: str, predictions: np.ndarray, targets: np.ndarray) -> float | None:
        """Standard error of a score; None for shares and correlations (`analysis.verdict.standard_error`)."""
        return None

    def knowing_nothing(self, train: Split, examples: TaskExamples, labels: Labels) -> Scores:
        """As `scored`, of who knows no more than how train's labels are distributed, on other examples."""
        targets = examples.labels.numpy()
        constant = self.ignorance(train, labels)
        predictions = np.broadcast_to(constant, (*self.asked(targets).shape, len(constant)))
        return self.scored(predictions, targets, labels)

    def ignorance(self, train: Split, labels: Labels) -> np.ndarray:
        """What such a one answers [C], whatever is asked."""
        raise NotImplementedError(f"{self.name} has no answer that is always the same")

    def features(self, states: torch.Tensor, batch: Batch) -> torch.Tensor:
        """What tells examples apart [B, ..., D] in a layer's states [B, T, D]: the mean over a text's tokens."""
        real = batch["attention_mask"].to(states.dtype)
        return torch.einsum("btd,bt->bd", of_text(states, batch), real) / real.sum(1, keepdim=True)

    def encoded(self, targets: np.ndarray) -> np.ndarray:
        """Targets [R] as numbers that a linear model can fit [R, columns]: a column per class that occurs."""
        classes, place = np.unique(targets, return_inverse=True)
        return np.eye(len(classes))[place]

    def decoded(self, fitted: np.ndarray, targets: np.ndarray, classes: int) -> np.ndarray:
        """What such a model fitted [R, columns] as predictions [R, C]."""
        known = np.unique(targets)
        predictions = np.full((len(fitted), classes), -np.inf, fitted.dtype)
        predictions[:, known] = fitted
        return predictions


def of_text(values: torch.Tensor, batch: Batch) -> torch.Tensor:
    """What a model says of a text's own tokens [B, L, ...]; an adapter's prompts may stand before them."""
    return values[:, values.shape[1] - batch["attention_mask"].shape[1] :]
