"""Typed run configs: YAML and key=value in, frozen objects out, one clear line per mistake."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from recyclable.errors import InputError

RecycleMethod = Literal["scratch", "init", "distill", "both", "interpolate", "apply", "project"]
TRAINING_FREE = ("apply", "project")
"""The methods that train nothing."""


class Settings(BaseModel):
    """Base of all run configs: unknown keys are refused, numbers are finite, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)


class TrainSettings(Settings):
    """The science of one training run; the ds_config owns the machine."""

    out: Path
    """Directory the result goes to. It must not hold another run's result."""
    max_steps: int = Field(gt=0)
    """Optimizer steps."""
    train_batch_size: int = Field(16, gt=0)
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
    seed: int = Field(20, ge=0)
    """Decides order, masks, fresh weights and dropout; rank numbers never do."""
    max_length: int = Field(128, gt=2)
    """Tokens per sequence, special tokens included."""
    dropout: float | None = Field(None, ge=0, lt=1)
    """Replaces every dropout rate of the base; null keeps the base's own."""
    attn_implementation: Literal["eager", "sdpa"] | None = None
    """How the trained model computes attention; null: as transformers chooses. On a CPU in bf16 and with short
    sequences, sdpa's backward pass takes several times as long as eager's."""
    eval_every: int | None = Field(None, gt=0)
    """Steps between evaluations; null: about 50 in the run. Step 0 and the last step are always evaluated."""
    eval_batch_size: int = Field(64, gt=0)
    """Examples per forward pass and rank in evaluation."""
    save_every: int = Field(500, ge=0)
    """Steps between checkpoints; 0 writes none."""
    log_every: int = Field(10, gt=0)
    """Steps between logged training losses."""

    def evaluation_interval(self) -> int:
        """Steps between evaluations, `eval_every` or a fiftieth of the run."""
        return self.eval_every or max(1, round(self.max_steps / 50))


class CorpusSettings(Settings):
    """Unlabelled text: files, a directory, or the name of a `datasets` data set."""

    train: str | list[str]
    heldout: str | list[str] | None = None
    """Text the held-out loss is measured on; null sets aside the last 2% of the packed training sequences."""
    text_column: str = "text"

    @model_validator(mode="before")
    @classmethod
    def _plain_path(cls, value: Any) -> Any:
        return {"train": value} if isinstance(value, (str, list)) else value


class PretrainConfig(TrainSettings):
    """`recyclable pretrain`: base + corpus -> upgraded base."""

    base: str
    corpus: CorpusSettings
    max_heldout_sequences: int | None = Field(None, gt=0)
    """The held-out loss is measured on the first so many sequences; null uses all."""
    mlm_probability: float = Field(0.15, gt=0, lt=1)
    mlm_head: Literal["auto", "keep", "fresh"] = "auto"
    """auto: keep a trained masked-LM head, make one where the base has none; keep and fresh insist."""
    mlm_head_steps: int | None = Field(None, ge=0)
    """Steps a fresh head trains alone, backbone and embeddings frozen; null: a tenth of max_steps."""
    mlm_head_learning_rate: float = Field(1e-3, gt=0)
    teacher: str | None = None
    """A frozen base with the same tokenizer to learn from as well, usually `base` itself: it then forgets less."""
    alpha: float = Field(0.5, ge=0, le=1)
    """With a teacher: (1 - alpha) mlm + alpha T^2 KL at the masked tokens + beta patient."""
    beta: float = Field(0.0, ge=0)
    """With a teacher of the same layers and width: weight of the patient (first token's hidden states) loss."""
    temperature: float = Field(1.0, gt=0)
    divergence: Literal["forward", "reverse", "jensen_shannon"] = "forward"
    """With a teacher: forward is KL(teacher || student), reverse KL(student || teacher), jensen_shannon in between."""
    mixing: float = Field(0.5, gt=0, lt=1)
    """b of jensen_shannon, b KL(teacher || m) + (1 - b) KL(student || m) with m = b teacher + (1 - b) student."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the saved base."""


class AdaptSettings(TrainSettings):
    """What tuning and recycling share: a base, a task, and how much of it is used."""

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
    group_by_length: bool = False
    """Texts of like length share a step: less padding, at the price of steps that are not quite random."""
    metric: str | None = None
    """Which dev score selects the best step; null: accuracy, or pearson for regression."""


class TuningSettings(Settings):
    """Which weights tuning trains: all of them, or an adapter's."""

    tuning: Literal["full", "lora", "bottleneck", "peft"] = "full"
    """peft: an adapter from elsewhere, as its own config describes it."""
    lora_r: int = Field(8, gt=0)
    lora_alpha: int = Field(16, gt=0)
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    bottleneck_size: int = Field(24, gt=0)
    target_modules: list[str] | None = None
    """Modules an adapter attaches to; null: the usual ones of the architecture."""


class TuneConfig(AdaptSettings, TuningSettings):
    """`recyclable tune`: base + task -> adapted weights."""

    tuning: Literal["full", "lora", "bottleneck"] = "full"


class InterpolationSettings(Settings):
    """`method: interpolate`: s task + (1 - s) sum over x of (alpha_x T^2 KL_x + beta_x patient_x).

    At x the student's weights are (1 - x) teacher + x own; x = 1, the student itself, is always one of the points.
    """

    start: Literal["fresh", "outdated"] | None = None
    """Where interpolate starts, null: outdated. The other methods' names say where they do."""
    task_share: float = Field(0.3, ge=0, le=1)
    """s: share of the labels' loss."""
    interpolation_points: list[Annotated[float, Field(gt=0, lt=1)]] | None = Field(None, min_length=1)
    """The x below 1; null: 0.25, 0.5, 0.75, or draws."""
    interpolation_draws: int | None = Field(None, gt=0)
    """So many x drawn anew at every step, r + (1 - 2r) U(0, 1), in place of fixed ones."""
    interpolation_margin: float = Field(0.0, ge=0, lt=0.5)
    """r: drawn x keep this distance from 0 and 1."""
    alpha_by_point: list[Annotated[float, Field(ge=0)]] | None = None
    """alpha_x in the order of x (drawn ones ascending), x = 1 last; null: alpha at each."""
    beta_by_point: list[Annotated[float, Field(ge=0)]] | None = None
    """beta_x in the same order; null: beta at each."""
    second_weights: str | None = None
    """Other adapted weights for the same labels: a second fixed model, and a second path with the same points."""
    second_base: str | None = None
    """The base that second_weights belong to."""

    @model_validator(mode="after")
    def _path(self) -> InterpolationSettings:
        if self.interpolation_points and self.interpolation_draws:
            raise ValueError("interpolation_points and interpolation_draws are both given, expected one of them")
        if (self.second_weights is None) != (self.second_base is None):
            raise ValueError("second_weights and second_base go together, found one of them")
        for name in ("alpha_by_point", "beta_by_point"):
            given, points = getattr(self, name), (self.interpolation_draws or len(self.points())) + 1
            if given is not None and len(given) != points:
                raise ValueError(f"{name}: {len(given)} values, expected {points}: one per point and one for x = 1")
        return self

    def points(self) -> tuple[float, ...]:
        """The fixed x below 1; none where they are drawn."""
        return () if self.interpolation_draws else tuple(self.interpolation_points or (0.25, 0.5, 0.75))


class StartSettings(Settings):
    """What happens to differences before they are added to the new base."""

    scale: float | Literal["auto"] = 1.0
    """Strength: new base + scale x difference; for LoRA, of its product. auto: one for each layer group, found on a few
    labelled dev examples with forward passes only (training-free methods)."""
    ties: float | None = Field(None, gt=0, le=1)
    """TIES: the share of each tensor's elements, the largest, that is kept; several weights are merged by sign."""
    dare: float | None = Field(None, ge=0, lt=1)
    """DARE: the share of elements that is dropped at random, from `seed`."""
    skip_embeddings: bool = False
    """Leave the new base's token embeddings (and untied LM head) as they are."""
    align: Literal["permutation"] | None = None
    """permutation: where the bases are not related, put each neuron's and head's difference where the new base has the
    one that is most like it; only together with allow_unrelated."""

    @field_validator("scale", mode="wrap")
    @classmethod
    def _number_or_auto(cls, value: Any, validate: Callable[[Any], float | str]) -> float | str:
        try:
            return validate(value)
        except ValidationError as error:  # it would name each type of the union
            raise ValueError(f"found {value!r}, expected: a finite number, or auto") from error

    def known_scale(self) -> float:
        """The scale, 1 where it is still to be found."""
        return 1.0 if self.scale == "auto" else self.scale

    def changes_start(self) -> bool:
        """Whether differences are added in any other way than as they are, as far as that is known."""
        scaled, merged = self.known_scale() != 1.0, self.ties is not None or self.dare is not None
        return scaled or merged or self.skip_embeddings or self.align is not None


class ProjectionSettings(Settings):
    """`method: project`: outdated weights mapped by what other tasks' weights on both bases show, without training."""

    project_from: list[tuple[str, str]] | None = Field(None, min_length=1)
    """[weights on the old base, weights of the same task on the new base] of each task that is known on both."""
    project_rank: int = Field(32, gt=0)
    """Axes of each tensor's projection."""
    project_with: Literal["linear", "network"] = "linear"
    """How coefficients along the axes are mapped: ridge regression, or a small network on top of it."""


class RecycleConfig(AdaptSettings, InterpolationSettings, StartSettings, ProjectionSettings):
    """`recyclable recycle`: outdated weights + old base + new base + task -> adapted weights of the new base."""

    method: RecycleMethod
    max_steps: int = Field(0, ge=0)
    """Optimizer steps; needed by every method but apply and project, which train nothing."""
    learning_rate: float = Field(0.0, ge=0)
    strength_examples: int = Field(128, gt=0)
    """Labelled dev examples, at most, on which `method: project` and `scale: auto` find their strength; the training
    examples are what the outdated weights were tuned on."""
    weights: str
    """The outdated adapted weights: a directory, or a name in the store."""
    store: str | None = None
    """The store's directory; null: the environment's RECYCLABLE_STORE, else ./store."""
    old_base: str
    """The base the outdated weights belong to."""
    alpha: float = Field(0.7, ge=0, le=1)
    """Share of distillation: (1 - alpha) task + alpha T^2 KL + beta patient; alpha_x in method interpolate."""
    beta: float = Field(10.0, ge=0)
    """Weight of the patient (first token's hidden states) loss; beta_x in method interpolate."""
    temperature: float = Field(5.0, gt=0)
    kd_reduction: Literal["batchmean", "paper"] = "batchmean"
    """paper: mean over batch *and* classes, as the paper's released code has it."""
    teacher: Literal["online", "cached"] = "cached"
    """online: the teacher computes in every step; cached: it answers once per example used, before training starts."""
    teacher_cache: Path | None = None
    """Directory that keeps a cached teacher's answers for other runs; null: in memory, for this run only (for each
    example used, layers x width numbers)."""
    teacher_top_k: int | None = Field(None, gt=0)
    """Only so many of the teacher's likeliest classes are learned from, the others count as impossible; null: all."""
    allow_unrelated: bool = False
    """Use weights whose base is no recorded ancestor of `base`; the manifest says so."""
    related_task: bool = False
    """Use another task's weights though its labels are others: the head is fresh, the KL term is left out."""

    def finds_strength(self) -> bool:
        """Whether the strength of the differences is found on labelled examples."""
        return self.method == "project" or self.scale == "auto"

    @model_validator(mode="after")
    def _trains(self) -> RecycleConfig:
        for name in ("start", "second_weights"):
            if getattr(self, name) is not None and self.method != "interpolate":
                raise ValueError(f"{name} is for method interpolate, found it with method {self.method}")
        for name in ("max_steps", "learning_rate"):
            if self.method not in TRAINING_FREE and not getattr(self, name):
                raise ValueError(f"{name} is missing or 0; method {self.method} trains")
        if (self.project_from is None) == (self.method == "project"):
            found = "without" if self.project_from is None else "with"
            raise ValueError(f"project_from belongs to method project, found method {self.method} {found} it")
        if self.scale == "auto" and self.method not in TRAINING_FREE:
            raise ValueError(f"scale auto is for {' and '.join(TRAINING_FREE)}, found it with method {self.method}")
        if self.align is not None and not self.allow_unrelated:
            raise ValueError(f"align is {self.align}, which is for unrelated bases: give allow_unrelated as well")
        if self.method == "project" and self.known_scale() != 1.0:
            raise ValueError(f"scale is {self.scale}, but method project finds its strength itself")
        return self


class StudyBase(Settings):
    """One base of a study: given (path) or made by continual pre-training of another."""

    path: str | None = None
    parent: str | None = None
    """Name of another base of the study, or a path or hub name."""
    corpus: CorpusSettings | None = None
    settings: dict[str, Any] = {}
    """Pre-training settings of this base, over the study's `pretrain`."""

    @model_validator(mode="after")
    def _one_origin(self) -> StudyBase:
        made = (self.parent is not None, self.corpus is not None)
        if made != ((False, False) if self.path is not None else (True, True)):
            raise ValueError("needs either `path`, or `parent` and `corpus`")
        return self


class StudyEdge(Settings):
    """One upgrade that weights are recycled over."""

    old: str
    new: str
    tuning: list[Literal["full", "lora", "bottleneck"]] = ["full"]

    @property
    def name(self) -> str:
        """OLD-NEW: how experiments and directories call it."""
        return f"{self.old}-{self.new}"


class StudyMethod(Settings):
    """One method of an experiment and the settings its hyperparameters are chosen from."""

    settings: list[dict[str, Any]] | dict[str, list[dict[str, Any]]] = [{}]
    """Candidates, or candidates by tuning kind; the best on the selection seed's dev set is used for all seeds."""

    def candidates(self, tuning: str) -> list[dict[str, Any]]:
        """The settings to choose from for one kind of tuning."""
        if isinstance(self.settings, list):
            return self.settings
        if tuning not in self.settings:
            raise InputError("settings", f"no candidates for tuning {tuning!r}, found {sorted(self.settings)}")
        return self.settings[tuning]


class StudyExperiment(Settings):
    """A set of methods compared under the same conditions."""

    shots: int | None = None
    recycle: dict[str, Any] = {}
    """Settings of every run of the experiment."""
    methods: dict[RecycleMethod, StudyMethod]
    tasks: list[str] | None = None
    """The tasks it is run on; null: all of the study's."""
    edges: list[str] | None = None
    """The edges it is run on, as OLD-NEW; null: all of the study's."""
    weights_from: dict[str, str] = {}
    """Task -> the task of the study whose outdated weights it recycles; left out: its own."""


class StudyConfig(Settings):
    """`recyclable study`: bases x tasks x tuning kinds x methods x seeds x shots as one restartable job."""

    out: Path
    bases: dict[str, StudyBase]
    tasks: dict[str, str | dict[str, Any]]
    edges: list[StudyEdge]
    seeds: list[int]
    selection_seed: int | None = None
    """Seed on which hyperparameters are chosen; it is not reported. Needed where a method has several candidates."""
    pretrain: dict[str, Any] = {}
    tune: dict[str, Any] = {}
    """Settings of the runs that make the outdated weights."""
    tune_by_tuning: dict[str, dict[str, Any]] = {}
    """More of them by kind of tuning, for example the adapter's learning rate."""
    experiments: dict[str, StudyExperiment]

    def edges_of(self, experiment: str) -> list[StudyEdge]:
        """The edges that an experiment is run on, in the study's order."""
        wanted = self.experiments[experiment].edges
        return [edge for edge in self.edges if wanted is None or edge.name in wanted]

    @model_validator(mode="after")
    def _consistent(self) -> StudyConfig:
        for edge in self.edges:
            for base in (edge.old, edge.new):
                if base not in self.bases:
                    raise ValueError(f"edges: {base!r} is not one of bases {sorted(self.bases)}")
        for name, experiment in self.experiments.items():
            for task in {*(experiment.tasks or ()), *experiment.weights_from, *experiment.weights_from.values()}:
                if task not in self.tasks:
                    raise ValueError(f"experiments.{name}: {task!r} is not one of tasks {sorted(self.tasks)}")
            known = [edge.name for edge in self.edges]
            if strange := set(experiment.edges or ()) - set(known):
                raise ValueError(f"experiments.{name}: {min(strange)!r} is not one of edges {known}")
        several = any(
            len(method.candidates(tuning)) > 1
            for name, experiment in self.experiments.items()
            for method in experiment.methods.values()
            for edge in self.edges_of(name)
            for tuning in edge.tuning
        )
        if several and self.selection_seed is None:
            raise ValueError("selection_seed: missing, but a method has several settings to choose from")
        if self.selection_seed in self.seeds:
            raise ValueError(f"selection_seed: {self.selection_seed} is also one of the reported seeds")
        return self


Config = TypeVar("Config", bound=Settings)


def load_config(cls: type[Config], path: str | Path, overrides: list[str] = ()) -> Config:
    """Read a YAML run config, apply `key=value` overrides (dots reach into sections), validate.

    Environment variables in strings are expanded. Raises InputError for a missing file, broken YAML, an unknown key,
    a wrong type, a missing key, an unset variable.
    """
    path = Path(path)
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise InputError(path, f"cannot be read ({error.strerror}); expected a YAML run config") from error
    except UnicodeDecodeError as error:
        raise InputError(path, f"is not UTF-8 text ({error.reason} at byte {error.start})") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise InputError(path, f"broken YAML: {place}{getattr(error, 'problem', error)}") from error
    if not isinstance(content, dict):
        raise InputError(path, f"holds {type(content).__name__}, expected a mapping of settings")
    for override in overrides:
        _override(content, override)
    return make_config(cls, content, path)


def make_config(cls: type[Config], content: dict[str, Any], where: object) -> Config:
    """Validate a mapping as config `cls`; InputError names `where` and each wrong field."""
    try:
        return cls.model_validate(_expand(content, where))
    except ValidationError as error:
        raise InputError(where, "; ".join(_one_line(cls, e) for e in error.errors())) from error


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 1e-4 as text; people mean a number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _override(content: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise InputError(override, "not understood, expected key=value")
    *sections, last = key.split(".")
    for section in sections:
        content = content.setdefault(section, {})
        if not isinstance(content, dict):
            raise InputError(override, f"{section} is not a section")
    try:
        content[last] = yaml.load(value, _Loader)
    except yaml.YAMLError as error:
        raise InputError(override, f"broken value {value!r}") from error


def _expand(value: Any, where: object) -> Any:
    if isinstance(value, dict):
        return {k: _expand(v, where) for k, v in value.items()}
    if isinstance(value, list):
        return [_expand(v, where) for v in value]
    if isinstance(value, str) and "$" in value:
        expanded = os.path.expandvars(value)
        if unset := re.search(r"\$\{?(\w+)", expanded):
            raise InputError(where, f"{value!r} uses the environment variable {unset[1]}, which is not set")
        return expanded
    return value


def _one_line(cls: type[Settings], error: dict[str, Any]) -> str:
    field = ".".join(str(part) for part in error["loc"]) or cls.__name__
    found = error["input"]
    match error["type"]:
        case "extra_forbidden":
            near = difflib.get_close_matches(field, cls.model_fields, n=1)
            return f"unknown key {field!r}" + (f", did you mean {near[0]!r}?" if near else "")
        case "missing":
            return f"key {field!r} is missing"
        case "value_error":
            return f"{field}: {error['ctx']['error']}"
        case _:
            return f"{field}: found {found!r}, expected: {error['msg'].removeprefix('Input should be ')}"
