"""What every kind of language model is: how text becomes examples, which head it has, what it learns; its settings.

Heavy imports wait until a run needs them: settings are read before anything is started.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator

from recyclable.config.settings import CorpusSettings, TrainSettings

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from recyclable.data.examples import Examples
    from recyclable.data.packing import Packed
    from recyclable.objectives.objective import Objective
    from recyclable.weights.base import Base


class LMKind(TrainSettings):
    """Continual pre-training of one kind of language model: base + corpus -> upgraded base."""

    purpose: ClassVar[str] = "pretrain"
    term: ClassVar[str]
    """The loss that held-out text is measured by."""

    lm: str
    """The kind's name."""
    base: str
    corpus: CorpusSettings
    max_heldout_sequences: int | None = Field(None, gt=0)
    """The held-out loss is measured on the first so many sequences; null uses all."""
    teacher: str | None = None
    """A frozen base with the same tokenizer to learn from as well, usually `base` itself: it then forgets less."""
    alpha: float = Field(0.5, ge=0, le=1)
    """With a teacher: (1 - alpha) lm + alpha T^2 KL at the predicted tokens + beta patient."""
    beta: float = Field(0.0, ge=0)
    """With a teacher of the same layers and width: weight of the patient (first token's hidden states) loss."""
    temperature: float = Field(1.0, gt=0)
    divergence: Literal["forward", "reverse", "jensen_shannon"] = "forward"
    """With a teacher: forward is KL(teacher || student), reverse KL(student || teacher), jensen_shannon in between."""
    mixing: float = Field(0.5, gt=0, lt=1)
    """b of jensen_shannon, b KL(teacher || m) + (1 - b) KL(student || m) with m = b teacher + (1 - b) student."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the saved base."""

    @model_validator(mode="after")
    def _read_by_teacher(self) -> LMKind:
        if self.teacher is None:
            self.require_unset(("alpha", "beta", "temperature", "divergence", "mixing"), "without a teacher")
        if self.divergence != "jensen_shannon":
            self.require_unset(("mixing",), f"with divergence {self.divergence}")
        return self

    @abstractmethod
    def require(self, base: Base, tokenizer: PreTrainedTokenizerBase) -> None:
        """InputError where the base is no language model of this kind."""

    @abstractmethod
    def examples(self, packed: Packed, tokenizer: PreTrainedTokenizerBase, indices: range) -> Examples:
        """Some of the packed sequences, as batches are made of them."""

    @abstractmethod
    def model(self, base: Base) -> tuple[PreTrainedModel, list[str]]:
        """The base with its head, unread, and the names of the parameters drawn fresh."""

    @abstractmethod
    def teaching(self, base: Base) -> PreTrainedModel:
        """A base as a teacher, unread; InputError where it has no trained head."""

    @abstractmethod
    def objective(self, model: nn.Module, teacher: nn.Module | None) -> Objective:
        """The text alone, or what a teacher says of it as well."""

    @abstractmethod
    def head_phase(self) -> TrainSettings | None:
        """How a fresh head is trained alone first, before anything else; None: it is not."""
