"""What every kind of language model is: how text becomes examples, which head it has, what it learns; its settings.

Heavy imports wait until a run needs them: settings are read before anything is started.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from pydantic import Field, model_validator

from recyclable.config.settings import CorpusSettings, Settings, TrainSettings
from recyclable.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from recyclable.data.examples import Batch, Examples
    from recyclable.data.layout import Layout
    from recyclable.data.packing import Joined, Packed
    from recyclable.objectives.apart import Apart
    from recyclable.objectives.objective import Objective
    from recyclable.weights.base import Base


class ReplaySettings(Settings):
    """Old text mixed into every step, against forgetting (Ibrahim et al. 2024, arXiv 2403.08763)."""

    corpus: CorpusSettings
    share: float = Field(ge=0.01, le=0.5)
    """Of the sequences of a step, exactly so over many steps."""


class HeadSettings(NamedTuple):
    """What becomes of a language-model head, whatever a kind calls these settings."""

    name: str
    """Of the setting that `treated` is."""
    treated: Literal["auto", "keep", "fresh"]
    """auto: keep a trained head, make one where the base has none; keep and fresh insist."""
    steps: int | None
    """Steps a fresh head trains alone, all else frozen; None: a tenth of max_steps."""
    learning_rate: float


class LMKind(TrainSettings):
    """Continual pre-training of one kind of language model: base + corpus -> upgraded base."""

    purpose: ClassVar[str] = "pretrain"
    term: ClassVar[str]
    """The loss that held-out text is measured by."""
    model_class: ClassVar[str]
    """transformers' AutoModelFor... that has the head, e.g. `MaskedLM`."""
    causal: ClassVar[bool] = False
    """Whether a token sees only those before it."""
    sees_all: ClassVar[bool] = False
    """Whether a patient loss compares the first token's states, which see all others; else the predicting tokens'."""

    lm: str
    """The kind's name."""
    base: str
    corpus: CorpusSettings
    replay: ReplaySettings | None = None
    """Old text beside the new: {corpus, share}; the held-out loss is then told on both."""
    extend_vocabulary: int | None = Field(None, gt=0)
    """So many new pieces are learned from the corpus and added to the base's tokenizer; old ones keep their ids. Each
    starts as the mean of the old pieces it is made of. null: the vocabulary stays. Not with a teacher."""
    attention: Literal["documents", "full"] = "full"
    """documents: of the documents that share a sequence none sees another; full: they do."""
    max_heldout_sequences: int | None = Field(None, gt=0)
    """The held-out loss is measured on the first so many sequences; null uses all."""
    teacher: str | None = None
    """A frozen base with the same tokenizer to learn from as well, usually `base` itself: it then forgets less."""
    alpha: float = Field(0.5, ge=0, le=1)
    """With a teacher: (1 - alpha) lm + alpha T^2 KL at the predicted tokens + beta patient."""
    beta: float = Field(0.0, ge=0)
    """With a teacher of the same layers and width: weight of the patient loss, on hidden states of the first token
    (masked) or of the predicting ones."""
    temperature: float = Field(1.0, gt=0)
    divergence: Literal["forward", "reverse", "jensen_shannon"] = "forward"
    """With a teacher: forward is KL(teacher || student), reverse KL(student || teacher), jensen_shannon in between."""
    mixing: float = Field(0.5, gt=0, lt=1)
    """b of jensen_shannon, b KL(teacher || m) + (1 - b) KL(student || m) with m = b teacher + (1 - b) student."""
    logits: Literal["fp32", "bf16"] = "fp32"
    """What logits are written and read in: bf16 takes less than half the memory and traffic, and rounds each by up to
    0.4%, as most losses do. For a model that computes in bf16 and whose last layer is a plain linear one."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the saved base."""

    @model_validator(mode="after")
    def _read_by_teacher(self) -> LMKind:
        if self.teacher is None:
            self.require_unset(("alpha", "beta", "temperature", "divergence", "mixing"), "without a teacher")
        if self.divergence != "jensen_shannon":
            self.require_unset(("mixing",), f"with divergence {self.divergence}")
        return self

    @model_validator(mode="after")
    def _teacher_knows_all_pieces(self) -> LMKind:
        if self.teacher is not None and self.extend_vocabulary is not None:
            raise ValueError("teacher is given, but knows none of the pieces of extend_vocabulary: leave one out")
        return self

    @classmethod
    def claims(cls, config: dict[str, Any]) -> bool:
        """Whether a base with this config.json is meant for this kind, where a run config names none."""
        return False

    @abstractmethod
    def require(self, base: Base, tokenizer: PreTrainedTokenizerBase) -> None:
        """InputError where the base is no language model of this kind."""

    def layout(self, tokenizer: PreTrainedTokenizerBase) -> Layout:
        """Which tokens are put around documents as they are packed."""
        from recyclable.data.layout import wrapped

        return wrapped(tokenizer)

    @abstractmethod
    def examples(
        self, packed: Packed | Joined, tokenizer: PreTrainedTokenizerBase, base: Base, indices: Sequence[int]
    ) -> Examples:
        """Some of the packed sequences, as batches are made of them."""

    @abstractmethod
    def full_batch(self, rows: int) -> Batch:
        """The largest batch of so many sequences, for who asks what it would take; its values mean nothing."""

    @property
    def packs_apart(self) -> bool:
        """By `attention`."""
        return self.attention == "documents"

    @abstractmethod
    def head(self) -> HeadSettings:
        """What becomes of the head."""

    def whole_documents(self, batch: Batch) -> Batch:
        """A batch in which each row is one document, if batches of this run say which tokens belong together."""
        if self.attention == "full":
            return batch
        sides = [side for side in ("", "decoder_") if f"{side}input_ids" in batch]
        return {**batch, **{f"{side}documents": 0 * batch[f"{side}input_ids"] for side in sides}}

    def model(self, base: Base) -> tuple[PreTrainedModel, list[str]]:
        """The base with its head, unread, and the names of the parameters drawn fresh."""
        from recyclable.models.language import language_model

        name, treated, *_ = self.head()
        model, missing = language_model(base, self.model_class, self.seed, self.dropout, treated == "fresh")
        if missing and treated == "keep":
            raise InputError(name, f"is 'keep', but {base.folder} has no trained head (lacks {missing[0]})")
        return model, missing

    def teaching(self, base: Base) -> PreTrainedModel:
        """A base as a teacher, unread; InputError where it has no trained head."""
        from recyclable.models.language import language_model

        model, missing = language_model(base, self.model_class, self.seed, None)
        if missing:
            raise InputError("teacher", f"{base.folder} has no trained {self.lm}-LM head (lacks {missing[0]})")
        return model

    def objective(
        self,
        model: nn.Module,
        teacher: nn.Module | None,
        apart: Apart | None = None,
        teachers: Apart | None = None,
    ) -> Objective:
        """The text alone, or what a teacher says of it as well.

        Args:
            apart: how the model is told of packed documents so that none sees another; None: it is not.
            teachers: how the teacher is.
        """
        from recyclable.data.examples import model_inputs
        from recyclable.objectives.token_distillation import TokenDistillation, TokenTeacher
        from recyclable.objectives.token_loss import TokenLoss
        from recyclable.objectives.token_states import Compared

        inputs = model_inputs if apart is None else apart.inputs(model)
        if teacher is None:
            return TokenLoss(model, self.term, inputs, logits=self.logits)
        teacher_inputs = model_inputs if teachers is None else teachers.inputs(teacher)
        return TokenDistillation(
            model,
            TokenTeacher(teacher, Compared(first=self.sees_all) if self.beta else None, teacher_inputs),
            alpha=self.alpha,
            beta=self.beta,
            temperature=self.temperature,
            divergence=self.divergence,
            mixing=self.mixing,
            logits=self.logits,
            term=self.term,
            inputs=inputs,
        )

    def head_phase(self) -> TrainSettings | None:
        """How a fresh head is trained alone first, before anything else; None: it is not.

        Gradients through a random head would wreck the backbone.
        """
        *_, steps, rate = self.head()
        steps = self.max_steps // 10 if steps is None else steps
        changed = {"max_steps": steps, "learning_rate": rate, "warmup_steps": 0, "save_every": 0}
        return self.model_copy(update=changed) if steps else None
