"""Builds a base with the right head and adapter, unread: every parameter knows where its values come from.

Whatever the base lacks is drawn from seed and tensor name. Values are read when the model is about to be used:
`weights.sources.fill` for one process, `training.zero.materialize` for a DeepSpeed engine.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
import transformers
from accelerate import init_empty_weights
from peft import LoraConfig, PeftModel, TaskType, get_peft_model, get_peft_model_state_dict
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.initialization import no_init_weights
from transformers.utils import logging as transformers_logging

from recyclable.adapters.bottleneck import BottleneckConfig
from recyclable.adapters.configs import read_adapter_config
from recyclable.analysis import permutation
from recyclable.config import StartSettings, TuningSettings
from recyclable.data.tasks import Task
from recyclable.errors import InputError
from recyclable.weights.adapted import ADAPTER, HEAD, AdaptedWeights
from recyclable.weights.base import Base, canonical_name, model_prefix, read_config
from recyclable.weights.checkpoint_files import Ranged, Renamed, TensorFiles
from recyclable.weights.differences import Differences
from recyclable.weights.fingerprint import tokenizer_digest
from recyclable.weights.sources import Read, drawn, fill, is_unread, seed_of, set_source
from recyclable.weights.starts import AdapterDifferences, carried, start, start_adapter, transformed
from recyclable.weights.vocabulary import vocabulary_tensors

transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()
AS_THEY_ARE = StartSettings()
"""Differences are added to the new base unchanged."""
_PEFT_PREFIX = "base_model.model."
_DROPOUT_FIELDS = (
    *("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout", "classifier_dropout_prob"),
    *("dropout", "attention_dropout", "seq_classif_dropout", "embedding_dropout", "mlp_dropout", "hidden_dropout"),
)


def locate(base: str | Path) -> Path:
    """The local directory of a base given by path or hub name; InputError when there is none."""
    folder = Path(base)
    if folder.is_dir():
        return folder
    if folder.is_absolute() or str(base).startswith(".") or str(base).count("/") > 1:
        raise InputError(base, "is missing, expected a model directory or a hub name")
    from huggingface_hub import snapshot_download

    try:
        wanted = ["*.safetensors", "*.json", "*.txt", "*.model"]
        return Path(snapshot_download(str(base), allow_patterns=wanted))
    except Exception as error:  # the hub client raises many kinds, from its own to the HTTP library's
        raise InputError(base, f"is no directory and the hub did not give it ({type(error).__name__})") from error


def require_length(folder: Path, max_length: int) -> None:
    """InputError when sequences of `max_length` tokens have more positions than the base."""
    limit = positions(folder)
    if limit is not None and max_length > limit:
        raise InputError("max_length", f"is {max_length}, but {folder} has positions for {limit} tokens at most")


def positions(folder: Path) -> int | None:
    """How many tokens a base has positions for; None for a base without a limit."""
    config = read_config(folder)
    limit = getattr(config, "max_position_embeddings", None)
    with torch.device("meta"):
        backbone = AutoModel.from_config(config)
    for name, module in backbone.named_modules():
        # RoBERTa and its kin count positions from the padding token's index on, so the first rows are never used
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            limit = module.num_embeddings - module.padding_idx - 1
    return limit


def masked_lm(base: Base | Path, head: str, seed: int, dropout: float | None) -> tuple[PreTrainedModel, list[str]]:
    """A base with its masked-LM head, unread, and the names of the parameters drawn fresh.

    Args:
        head: `auto` draws a head where the base has none, `keep` insists on the base's, `fresh` on a new one.
    """
    base = base if isinstance(base, Base) else Base(base)
    model, missing, other_shape = _unread(AutoModelForMaskedLM, base, _with_dropout(read_config(base.folder), dropout))
    if other_shape:
        problem = "; ".join(f"{n} is {found}, the model's is {wanted}" for n, (found, wanted) in other_shape.items())
        raise InputError(base.folder, f"cannot be loaded as {type(model).__name__}: {problem}")
    if missing and head == "keep":
        raise InputError("mlm_head", f"is 'keep', but {base.folder} has no trained head (lacks {missing[0]})")
    if head == "fresh":
        missing = [name for name, _ in model.named_parameters() if not name.startswith(model.base_model_prefix + ".")]
    _draw(model, missing, seed)
    return model, missing


def task_model(base: Base | Path, task: Task, seed: int, dropout: float | None) -> PreTrainedModel:
    """A base with a sequence-classification (or regression) head, unread, the head drawn from `seed`."""
    base = base if isinstance(base, Base) else Base(base)
    config = _with_dropout(task_config(base.folder, list(task.labels)), dropout)
    model, missing, other_shape = _unread(AutoModelForSequenceClassification, base, config)
    _draw(model, [*missing, *other_shape], seed)
    return model


def task_config(folder: Path, labels: list[str]) -> PretrainedConfig:
    """A base's config with a sequence-classification (or, without labels, regression) head."""
    config = read_config(folder)
    names = labels or ["value"]
    config.num_labels, config.id2label = len(names), dict(enumerate(names))
    config.label2id = {label: i for i, label in enumerate(names)}
    return config


def _with_dropout(config: PretrainedConfig, dropout: float | None) -> PretrainedConfig:
    for field in _DROPOUT_FIELDS if dropout is not None else ():
        if hasattr(config, field):
            setattr(config, field, dropout)
    return config


def structure(
    config: PretrainedConfig, auto_class=AutoModelForSequenceClassification, architecture: str | None = None
) -> PreTrainedModel:
    """A model without weights, in evaluation mode, as `from_pretrained` makes it; named in `config.architectures`.

    Its parameters are fp32 on the meta device, its buffers are real.

    Args:
        architecture: a class of transformers for this config, instead of the one that `auto_class` finds.
    """
    make = auto_class.from_config
    if architecture is not None:
        make = getattr(transformers, architecture, None)
        if not (isinstance(make, type) and issubclass(make, PreTrainedModel) and make.config_class is type(config)):
            raise InputError("architecture", f"found {architecture!r}, no model of type {config.model_type!r}")
        make = make._from_config
    try:
        with init_empty_weights(include_buffers=False), no_init_weights():
            model = make(config, dtype=torch.float32)
    except (ValueError, TypeError, RuntimeError, AttributeError) as error:
        raise InputError("config.json", f"makes no model: {error}") from error
    model.tie_weights()  # putting parameters on the meta device has parted them
    config.architectures = [type(model).__name__]
    return model.eval()


def adapter_base_name(name: str, base: Base) -> str:
    """The canonical name that a tensor of a PEFT adapter's file would have in the base."""
    inside = _PEFT_PREFIX if name.startswith(_PEFT_PREFIX) else "base_model."  # prompts stand beside the model
    return canonical_name(name.removeprefix(inside), base.prefix)


def attach_adapter(model: PreTrainedModel, config: TuningSettings, seed: int) -> nn.Module:
    """The model as it is for full fine-tuning, or with a LoRA or bottleneck adapter and everything else frozen.

    The head is trained and saved whole (`modules_to_save`), the bottleneck adapter trains the layer norms as well.
    """
    if config.tuning == "full":
        return model
    shared = {"modules_to_save": head_modules(model), "target_modules": config.target_modules}
    if config.tuning == "lora":
        peft = LoraConfig(
            task_type=TaskType.SEQ_CLS,
            r=config.lora_r,
            lora_alpha=config.lora_alpha,
            lora_dropout=config.lora_dropout,
            **shared,
        )
    else:
        norms = sorted({n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, nn.LayerNorm)})
        shared["modules_to_save"] = shared["modules_to_save"] + norms
        peft = BottleneckConfig(task_type=TaskType.SEQ_CLS, bottleneck_size=config.bottleneck_size, **shared)
    with _drawn_from(seed, config.tuning):
        try:
            return get_peft_model(model, peft)
        except ValueError as error:
            raise InputError("target_modules", f"found {config.target_modules}: {error}") from error


def attach_same(model: PreTrainedModel, weights: AdaptedWeights, seed: int) -> nn.Module:
    """The model with a fresh adapter of the very kind that `weights` are, by their own config; as it is for a delta."""
    if weights.manifest.architecture not in (None, type(model).__name__):
        raise InputError(
            weights.folder, f"was tuned as {weights.manifest.architecture}, expected a {type(model).__name__}"
        )
    if not weights.is_adapter:
        return model
    return attach_peft(model, weights.folder, weights.manifest.tuning["tuning"], seed)


def attach_peft(model: PreTrainedModel, folder: Path, tuning: str, seed: int) -> PeftModel:
    """The model with a fresh adapter that the PEFT config in `folder` describes.

    DoRA's fresh values depend on the weights: for it they are read now, whole.
    """
    config = read_adapter_config(folder)
    if getattr(config, "use_dora", False):
        fill(model)
    bare = model.device.type == "meta" and not is_unread(model)  # a structure that will never have values
    with _drawn_from(seed, tuning):
        try:
            return get_peft_model(model, config, low_cpu_mem_usage=bare)
        except Exception as error:  # whatever a config of another kind or model makes of this one
            problem = f"does not fit {model.config.model_type} ({type(error).__name__}: {error})"
            raise InputError(folder, problem) from error


@contextmanager
def _drawn_from(seed: int, name: str) -> Iterator[None]:
    """PEFT draws from torch's global generator: give it one of this seed and name for a while.

    It draws an adapter's weights and then moves them to where the base's are: the meta device would lose them.
    """
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by a name that will change
        torch.manual_seed(seed_of(seed, name))
        with patch.object(nn.Module, "to", lambda module, *_, **__: module):
            yield


def head_modules(model: PreTrainedModel) -> list[str]:
    """Names of the modules that belong to the task: all beside the backbone, and the backbone's pooler."""
    return [*label_heads(model), *(["pooler"] if getattr(model.base_model, "pooler", None) is not None else [])]


def label_heads(model: nn.Module) -> dict[str, nn.Module]:
    """The modules beside the backbone by name, in plain and PEFT models: they alone know of the task's labels."""
    if isinstance(model, PeftModel):
        model = model.get_base_model()
    children = ((name, child) for name, child in model.named_children() if child is not model.base_model)
    return {name: child for name, child in children if any(True for _ in child.parameters())}


def canonical_names(model: nn.Module) -> dict[str, str]:
    """Canonical name -> the model's parameter name, for plain and PEFT models; tied parameters once."""
    prefix = model_prefix(model.config)
    return {canonical_name(name.removeprefix(_PEFT_PREFIX), prefix): name for name, _ in model.named_parameters()}


def differences_on(
    new: Base,
    weights: AdaptedWeights,
    old: Base,
    changes: StartSettings = AS_THEY_ARE,
    seed: int = 0,
) -> Differences:
    """What outdated weights add to the new base: rows aligned by token, merged, thinned and scaled.

    A scale that is still to be found counts as 1.
    """
    if weights.is_adapter:
        if changes.changes_start():
            raise InputError(weights.folder, "is an adapter: scale, ties, dare, skip_embeddings, align change deltas")
        return AdapterDifferences(weights.file(ADAPTER), old.hashed, shared_with_base(weights, old, new))
    differences, _ = carried(weights, old, new, tokenizer_digest(new))
    if changes.align is not None:
        differences = permutation.align(differences, old, new)
    left_out = vocabulary_tensors(new) if changes.skip_embeddings else frozenset()
    how = {"scale": changes.known_scale(), "ties": changes.ties, "dare": changes.dare, "seed": seed}
    return transformed([differences], left_out, **how)


def shared_with_base(weights: AdaptedWeights, old: Base, new: Base) -> dict[str, str]:
    """PEFT name -> canonical name of an adapter's tensors that replace the base's own (layer norms)."""
    named = ((name, adapter_base_name(name, new)) for name in weights.file(ADAPTER).names)
    return {name: base_name for name, base_name in named if base_name in old and base_name in new}


def adapter_head(model: nn.Module, weights: AdaptedWeights, base: Base) -> set[str]:
    """PEFT names of an adapter's tensors that belong to the task's head."""
    heads = {*label_heads(model), "pooler"}
    return {n for n in weights.file(ADAPTER).names if adapter_base_name(n, base).partition(".")[0] in heads}


def load_adapted(
    model: nn.Module,
    weights: AdaptedWeights,
    old: Base,
    new: Base,
    changes: StartSettings = AS_THEY_ARE,
    seed: int = 0,
    head: bool = True,
) -> None:
    """Make a model of the new base start from outdated weights (`weights.starts` has the arithmetic).

    Args:
        head: False leaves the model's own head for its labels as it is.

    Raises InputError that lists every tensor that is missing, left over or of another shape.
    """
    load_differences(model, weights, differences_on(new, weights, old, changes, seed), old, new, head)


def load_differences(
    model: nn.Module, weights: AdaptedWeights, differences: Differences, old: Base, new: Base, head: bool = True
) -> None:
    """As `load_adapted`, with differences that were made from those of the weights."""
    skipped = () if head else tuple(f"{name}." for name in label_heads(model))

    def kept(names: Iterable[str]) -> list[str]:
        return [name for name in names if not name.removeprefix(_PEFT_PREFIX).startswith(skipped)]

    if weights.is_adapter:
        places, shapes, shared = adapter_parameters(model), adapter_shapes(model), shared_with_base(weights, old, new)
        found = {n: differences.shape(n) for n in kept(differences.names)}
        require_same(weights.folder, found, {n: shapes[n] for n in kept(shapes)})
        for name in kept(places):
            set_source(places[name], partial(start_adapter, new.hashed, differences, name, shared.get(name)))
        return
    names, tensors = canonical_names(model), weights.file(HEAD)
    found = {n: differences.shape(n) for n in differences.names} | {n: tensors.shape(n) for n in kept(tensors.names)}
    require_same(weights.folder, found, {n: tuple(model.get_parameter(names[n]).shape) for n in kept(names)})
    own = old.folder == new.folder
    for name in differences.names:
        read = partial(start, new.hashed, differences, name, dtype=torch.float32, own=own)
        set_source(model.get_parameter(names[name]), read)
    start_from(model, tensors, {names[n]: n for n in kept(tensors.names)})


def start_from(model: nn.Module, tensors: Ranged, stored_name: Mapping[str, str]) -> None:
    """Make parameters start from tensors as they are.

    Args:
        stored_name: the model's name of each of these parameters -> its name among the tensors.
    """
    for name, stored in stored_name.items():
        set_source(model.get_parameter(name), partial(tensors.read, stored))


def adapter_parameters(model: PeftModel) -> dict[str, nn.Parameter]:
    """Name in PEFT's file -> parameter, of everything that PEFT saves."""
    parameters = dict(model.named_parameters())
    saved = get_peft_model_state_dict(model, state_dict=parameters, save_embedding_layers=False)
    if "prompt_embeddings" in saved:  # computed, not taken from the parameters that were given
        saved["prompt_embeddings"] = model.prompt_encoder["default"].embedding.weight
    return saved


def require_adapter_fits(folder: Path, file: Ranged, config: PretrainedConfig, architecture: str | None) -> None:
    """InputError that lists every tensor of an adapter's file that its own config and the model's do not expect so.

    Args:
        folder: where the adapter's config lies.
        architecture: as for `structure`.
    """
    planned = attach_peft(structure(config, architecture=architecture), folder, "peft", seed=0)
    require_same(folder, {name: file.shape(name) for name in file.names}, adapter_shapes(planned))


def adapter_shapes(model: PeftModel) -> dict[str, tuple[int, ...]]:
    """Name in PEFT's file -> shape, of everything that PEFT saves."""
    for encoder in getattr(model, "prompt_encoder", {}).values():
        if any(parameter.is_meta for parameter in encoder.parameters()):
            encoder.to_empty(device="cpu")  # its file holds what it computes
    return {name: tuple(parameter.shape) for name, parameter in adapter_parameters(model).items()}


def pooler_tensors(base: Base) -> Renamed:
    """The pooler a base was saved with: a masked-LM model has no place for it, its children should keep it."""
    names = {canonical_name(stored, base.prefix): stored for stored in base.source.names}
    return Renamed(base.source, {f"{base.prefix}.{n}": names[n] for n in names if n.startswith("pooler.")})


def _unread(
    auto_class, base: Base, config: PretrainedConfig
) -> tuple[PreTrainedModel, list[str], dict[str, tuple[tuple[int, ...], tuple[int, ...]]]]:
    """A model whose parameters start from the base's files.

    Returns it with the names of the parameters that the files lack, and of those that they have in another shape
    (found, wanted); both only outside the backbone, else it is an InputError.
    """
    try:
        model = structure(config, auto_class)
    except ValueError as error:
        raise InputError(base.folder, f"cannot be loaded as {auto_class.__name__}: {error}") from error
    files: TensorFiles = base.source
    stored_name = {canonical_name(stored, base.prefix): stored for stored in files.names}
    missing, other_shape = [], {}
    for names in _tied_names(model):
        parameter, wanted = model.get_parameter(names[0]), tuple(model.get_parameter(names[0]).shape)
        found = [c for c in (canonical_name(name, base.prefix) for name in names) if c in stored_name]
        if not found:
            missing.append(names[0])
        elif files.shape(stored_name[found[0]]) != wanted:
            other_shape[names[0]] = (files.shape(stored_name[found[0]]), wanted)
        else:
            reads = [partial(base.hashed.read, c) if c in base else partial(files.read, stored_name[c]) for c in found]
            set_source(parameter, reads[0] if len(reads) == 1 else partial(_equal, base.folder, found, reads))
    backbone = [n for n in sorted([*missing, *other_shape]) if n.startswith(f"{model.base_model_prefix}.")]
    backbone = [n for n in backbone if ".pooler." not in n]
    if backbone:
        converted = get_model_conversion_mapping(model, add_legacy=False)
        hint = f"; transformers converts {config.model_type} checkpoints as it loads them, which is not supported"
        problem = f"lacks {len(backbone)} backbone tensors: {', '.join(backbone)}"
        raise InputError(base.folder, problem + (hint if converted else ""))
    for name, buffer in model.named_buffers():
        if (canonical := canonical_name(name, base.prefix)) in stored_name and name in model.state_dict():
            buffer.copy_(files[stored_name[canonical]])
    return model, sorted(missing), other_shape


def _tied_names(model: nn.Module) -> list[list[str]]:
    """The names of each parameter; tied ones have several."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return list(names.values())


def _equal(folder: Path, names: list[str], reads: list[Read], start: int, stop: int) -> torch.Tensor:
    """A tied parameter that the files hold several times."""
    first = reads[0](start, stop)
    for name, read in zip(names[1:], reads[1:], strict=True):
        if not torch.equal(read(start, stop), first):
            raise InputError(folder, f"its config ties {name} to {names[0]}, but its files hold different values")
    return first


def _draw(model: PreTrainedModel, names: list[str], seed: int) -> None:
    """Fresh values from seed and name alone."""
    std = getattr(model.config, "initializer_range", 0.02)
    for name in names:
        parameter = model.get_parameter(name)
        set_source(parameter, drawn(seed, canonical_name(name, model_prefix(model.config)), parameter.shape, std))


def require_same(where: Path, found: Mapping[str, tuple], wanted: Mapping[str, tuple]) -> None:
    """InputError that lists every tensor (name -> shape) that is missing, left over or of another shape."""
    problems = [f"{n} is missing" for n in wanted.keys() - found.keys()]
    problems += [f"{n} has no place in the model" for n in found.keys() - wanted.keys()]
    other = [n for n in found.keys() & wanted if found[n] != wanted[n]]
    problems += [f"{n} is {found[n]}, the model's is {wanted[n]}" for n in other]
    if problems:
        raise InputError(where, f"does not fit the model: {'; '.join(sorted(problems))}")
