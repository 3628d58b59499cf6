"""Settings that verbs share: where a run writes, how it trains, which task it is for; others lie by their reader."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, ClassVar, Literal, Self, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidatorFunctionWrapHandler, field_validator, model_validator

_MOST_AHEAD = 1024
"""Processes, or steps of each: torch forks whatever number it is given, and counts to it."""
_BITS = 63
"""Of a whole number: arrays and files have no larger ones."""


class Settings(BaseModel):
    """Base of all settings: unknown keys are refused, numbers are finite, of 64 bits and no booleans,
    values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)
    purpose: ClassVar[str] = ""
    """Who reads these settings, as messages call it; empty: the class's name."""

    @field_validator("*", mode="wrap")
    @classmethod
    def _plain_number(cls, value: Any, validated: ValidatorFunctionWrapHandler) -> Any:
        found = validated(value)
        if isinstance(value, bool) and isinstance(found, int | float) and not isinstance(found, bool):
            raise ValueError(f"found {value!r}, expected a number")
        if isinstance(found, int) and found.bit_length() > _BITS:
            raise ValueError(f"found a number of {found.bit_length()} bits, expected at most {_BITS}")
        return found

    @classmethod
    def reader(cls) -> str:
        """Who reads these settings."""
        return cls.purpose or cls.__name__

    @classmethod
    def explained(cls) -> list[dict[str, Any]]:
        """Each setting: name, type, whether it must be given, its default (for JSON), and what it is about."""
        return [
            {
                "name": name,
                "type": _type_name(field.annotation),
                "required": field.is_required(),
                "default": None if field.is_required() else field.get_default(),
                "about": field.description or "",
            }
            for name, field in cls.model_fields.items()
        ]

    def require_unset(self, names: Iterable[str], why: str) -> None:
        """ValueError where one of these was given, which nothing would read."""
        for name in names:
            if name in self.model_fields_set and getattr(self, name) is not None:
                raise ValueError(f"{name} is given, but nothing reads it {why}")


def _type_name(annotation: Any) -> str:
    """A type as people write it: `int`, `float | None`, `"cached" | "online"`."""
    if get_origin(annotation) in (Union, UnionType):
        return " | ".join(_type_name(each) for each in get_args(annotation))
    if get_origin(annotation) is Literal:
        return " | ".join(f'"{each}"' for each in get_args(annotation))
    if get_origin(annotation) is Annotated:
        return _type_name(get_args(annotation)[0])
    if inner := get_args(annotation):
        return f"{get_origin(annotation).__name__}[{', '.join(_type_name(each) for each in inner)}]"
    return "None" if annotation is type(None) else getattr(annotation, "__name__", str(annotation))


class RunSettings(Settings):
    """What every run has."""

    out: Path
    """Directory the result goes to. It must not hold another run's result."""
    seed: int = Field(20, ge=0)
    """Decides order, masks, fresh weights, shots and dropout; rank numbers never do."""
    max_length: int = Field(128, gt=2)
    """Tokens per sequence, special tokens included."""
    eval_batch_size: int = Field(64, gt=0)
    """Examples per forward pass and rank in evaluation."""


class TrainSettings(RunSettings):
    """The science of one training run; the ds_config owns the machine."""

    max_steps: int = Field(gt=0)
    """Optimizer steps."""
    train_batch_size: int = Field(16, gt=0, le=1 << 24)
    """Examples per optimizer step, over all ranks and accumulation steps."""
    learning_rate: float = Field(gt=0)
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = "linear"
    warmup_steps: int = Field(0, ge=0)
    weight_decay: float = Field(0.01, ge=0)
    """Not applied to biases and norms."""
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    adam_epsilon: float = Field(1e-8, gt=0)
    max_grad_norm: float = Field(1.0, ge=0)
    """Gradients are clipped to this global norm; 0 leaves them alone."""
    dropout: float | None = Field(None, ge=0, lt=1)
    """Replaces every dropout rate of the base; null keeps the base's own."""
    attn_implementation: Literal["eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3"] | None = (
        None
    )
    """How the trained model computes attention; null: flash-attention where it is installed, the GPU and the model can
    and products are in bf16 or fp16, else sdpa, else eager. On a CPU in bf16 null writes
    attention over up to 256 keys out as products and a softmax, several times as fast as the fused kernel there."""
    gradient_checkpointing: bool | None = None
    """Layers keep their inputs alone and compute again in the backward pass: far less memory, a third more time, the
    same result; null: as the ds_config says (`activation_checkpointing`)."""
    torch_compile: bool = False
    """The trained model's repeated layers are compiled, one graph for all of a kind, but for a last layer that computes
    only what is read: about a minute at the start, and again at the second length or batch size; not under ZeRO-3 on
    several ranks or with offload, nor along a path (`interpolate`). Losses as without but for rounding; with
    dropout other numbers are drawn."""
    eval_every: int | None = Field(None, gt=0)
    """Steps between evaluations; null: about 50 in the run. Step 0 and the last step are always evaluated."""
    save_every: int = Field(500, ge=0)
    """Steps between checkpoints; 0 writes none by steps."""
    save_every_minutes: float | None = Field(None, gt=0)
    """Minutes between checkpoints, besides; null: by steps alone."""
    save_total_limit: int = Field(2, ge=1)
    """How many checkpoints stay, the last ones; should the newest be broken, a run goes on from the one before."""
    log_every: int = Field(10, gt=0)
    """Steps between logged training losses."""
    dataloader_num_workers: int | None = Field(None, ge=0, le=_MOST_AHEAD)
    """Processes beside each rank that make batches ahead of its steps; 0: none, the rank makes them itself; null: 2 on
    a GPU (fewer where cores are short), 0 on a CPU, whose cores are busy with the steps, where the ds_config offloads
    optimizer or parameters, which would be held twice, and where /dev/shm has less than 1 GiB free. Results are the
    same."""
    dataloader_prefetch_factor: int | None = Field(None, ge=1, le=_MOST_AHEAD)
    """Steps that each of these processes is ahead; null: 2. Where `dataloader_num_workers: null` comes to 0 on a
    machine, it waits for one with workers."""
    bad_step: Literal["stop", "skip"] = "stop"
    """What becomes of a step whose loss or gradients are no finite numbers, or whose loss is a spike: the run stops
    before it, or it is left out; weights, moments and Adam's count stay as they were. Its batch goes to `bad_steps`."""
    max_bad_steps: int = Field(3, ge=0)
    """How many bad steps in a row are left out before the run stops after all."""
    spike_factor: float | None = Field(None, gt=1)
    """A loss is a spike where it is more than so many times the median of the last 100 steps; null: none is."""

    @model_validator(mode="after")
    def _nobody_ahead(self) -> Self:
        if self.dataloader_num_workers == 0:
            self.require_unset(("dataloader_prefetch_factor",), "with dataloader_num_workers: 0")
        return self

    @property
    def packs_apart(self) -> bool:
        """Whether documents share a sequence and none may see another, for which flash-attention is not tried."""
        return False

    @property
    def writes_checkpoints(self) -> bool:
        """Whether any is written."""
        return self.save_every_minutes is not None or 0 < self.save_every <= self.max_steps

    def evaluation_interval(self) -> int:
        """Steps between evaluations, `eval_every` or a fiftieth of the run."""
        return self.eval_every or max(1, round(self.max_steps / 50))


class TaskSettings(RunSettings):
    """A base, a task, and how much of it is used."""

    base: str
    """The model the adapted weights end up on."""
    task: str | dict[str, Any]
    """A task directory, a task file, or the task file's content."""
    shots: int | None = Field(None, gt=0)
    """Examples per class in train and dev; null uses all."""
    max_dev_examples: int | None = Field(None, gt=0)
    """A fixed random subset of dev keeps frequent evaluation cheap; null uses all."""
    max_test_examples: int | None = Field(None, gt=0)
    """The same of test; it depends on the seed, so compare runs of one seed."""
    metric: str | None = None
    """Which dev score selects the best step; null: the usual one of the kind of task."""


class LearnSettings(TaskSettings, TrainSettings):
    """Training on a task."""

    group_by_length: bool = False
    """Texts of like length share a step: less padding, at the price of steps that are not quite random."""
    logits: Literal["fp32", "bf16"] = "fp32"
    """Where answers are text: what logits over the vocabulary, a teacher's too, are written and read in. bf16 takes
    less than half the memory and traffic, and rounds each by up to 0.4%; for a model that computes in bf16 and whose
    last layer is a plain linear one."""
    early_stopping_patience: int | None = Field(None, gt=0)
    """The run stops after so many evaluations in a row without a better dev score; null: never. The learning rate is
    that of `max_steps` all the same."""
    early_stopping_threshold: float = Field(0.0, ge=0)
    """By how much more than nothing a score must be above the best before it, else it counts as no better."""

    @model_validator(mode="after")
    def _read_threshold(self) -> LearnSettings:
        if self.early_stopping_threshold and self.early_stopping_patience is None:
            raise ValueError("early_stopping_threshold is given, but nothing reads it without early_stopping_patience")
        return self


class CorpusSettings(Settings):
    """Unlabelled text: files, a directory, or the name of a `datasets` data set."""

    train: str | list[str]
    heldout: str | list[str] | None = None
    """Text the held-out loss is measured on; null sets aside the last 2% of the packed training sequences."""
    text_column: str = "text"
    bad_rows: Literal["refuse", "skip"] = "refuse"
    """Rows that cannot be used (bytes that are no UTF-8, NUL characters, broken JSON, damaged gzip members ...): refuse
    ends the run with the first, skip leaves them out, and they are counted, told and recorded."""

    @model_validator(mode="before")
    @classmethod
    def _plain_path(cls, value: Any) -> Any:
        return {"train": value} if isinstance(value, (str, list)) else value
