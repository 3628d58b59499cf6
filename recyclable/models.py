"""Loads a base with the right head and adapter; whatever the base lacks is drawn from seed and tensor name."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

import torch
from accelerate import init_empty_weights
from peft import LoraConfig, PeftModel, TaskType, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.initialization import no_init_weights
from transformers.utils import logging as transformers_logging

from recyclable.adapters.bottleneck import BottleneckConfig
from recyclable.config import TuningSettings
from recyclable.data.tasks import Task
from recyclable.errors import InputError
from recyclable.weights.adapted import ADAPTER, HEAD, AdaptedWeights
from recyclable.weights.base import Base, canonical_name, model_prefix, read_config
from recyclable.weights.checkpoint_files import TensorFiles
from recyclable.weights.fingerprint import tokenizer_digest
from recyclable.weights.starts import carried, outdated_adapter, start

transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()
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
    config = read_config(folder)
    limit = getattr(config, "max_position_embeddings", None)
    with torch.device("meta"):
        backbone = AutoModel.from_config(config)
    for name, module in backbone.named_modules():
        # RoBERTa and its kin count positions from the padding token's index on, so the first rows are never used
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            limit = module.num_embeddings - module.padding_idx - 1
    if limit is not None and max_length > limit:
        raise InputError("max_length", f"is {max_length}, but {folder} has positions for {limit} tokens at most")


def masked_lm(folder: Path, head: str, seed: int, dropout: float | None) -> tuple[PreTrainedModel, list[str]]:
    """A base with its masked-LM head (fp32) and the names of the parameters drawn fresh.

    Args:
        head: `auto` draws a head where the base has none, `keep` insists on the base's, `fresh` on a new one.
    """
    model, missing = _from_files(AutoModelForMaskedLM, folder, dropout)
    if missing and head == "keep":
        raise InputError("mlm_head", f"is 'keep', but {folder} has no trained head (lacks {missing[0]})")
    if head == "fresh":
        missing = [name for name, _ in model.named_parameters() if not name.startswith(model.base_model_prefix + ".")]
    _draw(model, missing, seed)
    return model, missing


def task_model(folder: Path, task: Task, seed: int, dropout: float | None) -> PreTrainedModel:
    """A base with a sequence-classification (or regression) head in fp32, the head drawn from `seed`."""
    labels = list(task.labels) or ["value"]
    model, missing = _from_files(
        AutoModelForSequenceClassification,
        folder,
        dropout,
        num_labels=len(labels),
        id2label=dict(enumerate(labels)),
        label2id={label: i for i, label in enumerate(labels)},
        ignore_mismatched_sizes=True,
    )
    _draw(model, missing, seed)
    return model


def task_config(folder: Path, labels: list[str]) -> PretrainedConfig:
    """A base's config with a sequence-classification (or, without labels, regression) head."""
    config = read_config(folder)
    names = labels or ["value"]
    config.num_labels, config.id2label = len(names), dict(enumerate(names))
    config.label2id = {label: i for i, label in enumerate(names)}
    return config


def structure(config: PretrainedConfig) -> PreTrainedModel:
    """A model without weights (its parameters are on the meta device); names it in `config.architectures`."""
    with init_empty_weights(include_buffers=False), no_init_weights():
        model = AutoModelForSequenceClassification.from_config(config)
    config.architectures = [type(model).__name__]
    return model


def adapter_base_name(name: str, base: Base) -> str:
    """The canonical name that a tensor of a PEFT adapter's file would have in the base."""
    return canonical_name(name.removeprefix(_PEFT_PREFIX), base.prefix)


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
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by a name that will change
        torch.manual_seed(_seed_of(seed, config.tuning))
        try:
            return get_peft_model(model, peft)
        except ValueError as error:
            raise InputError("target_modules", f"found {config.target_modules}: {error}") from error


def head_modules(model: PreTrainedModel) -> list[str]:
    """Names of the modules that belong to the task: all beside the backbone, and the backbone's pooler."""
    backbone = model.base_model
    heads = [
        name
        for name, child in model.named_children()
        if child is not backbone and any(True for _ in child.parameters())
    ]
    return heads + (["pooler"] if getattr(model.base_model, "pooler", None) is not None else [])


def canonical_names(model: nn.Module) -> dict[str, str]:
    """Canonical name -> the model's parameter name, for plain and PEFT models; tied parameters once."""
    prefix = model_prefix(model.config)
    return {canonical_name(name.removeprefix(_PEFT_PREFIX), prefix): name for name, _ in model.named_parameters()}


def load_adapted(model: nn.Module, weights: AdaptedWeights, old: Base, new: Base) -> None:
    """Put outdated weights onto a model of the new base, in place (`weights.starts` has the arithmetic).

    Raises InputError that lists every tensor that is missing, left over or of another shape.
    """
    if weights.is_adapter:
        adapter = dict(weights.tensors(ADAPTER))
        base_name_of = {n: adapter_base_name(n, new) for n in adapter}
        _require_same(weights, {n: tuple(t.shape) for n, t in adapter.items()}, _adapter_shapes(model))
        set_peft_model_state_dict(model, outdated_adapter(old, new, adapter, base_name_of))
    else:
        names = canonical_names(model)
        differences, _ = carried(weights, old, new, tokenizer_digest(new))
        found = {n: differences.shape(n) for n in differences.names}
        found.update({n: tuple(t.shape) for n, t in weights.tensors(HEAD)})
        _require_same(weights, found, {n: tuple(model.get_parameter(name).shape) for n, name in names.items()})
        own = old.folder == new.folder
        started = ((n, start(new, differences, n, 0, None, torch.float32, own)) for n in differences.names)
        assign(model, ((names[n], t.view(found[n])) for n, t in chain(started, weights.tensors(HEAD))))


def assign(model: nn.Module, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Copy values into parameters by the model's own names."""
    with torch.no_grad():
        for name, tensor in tensors:
            model.get_parameter(name).copy_(tensor)


def pooler_tensors(folder: Path, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
    """The pooler a base was saved with: a masked-LM model has no place for it, its children should keep it."""
    files = TensorFiles(folder)
    return (
        (f"{prefix}.{canonical_name(name, prefix)}", files[name])
        for name in files.names
        if canonical_name(name, prefix).startswith("pooler.")
    )


def _from_files(auto_class, folder: Path, dropout: float | None, **kwargs) -> tuple[PreTrainedModel, list[str]]:
    config = read_config(folder)
    TensorFiles(folder)  # a pickle or a broken header is reported before transformers looks at it
    for field in _DROPOUT_FIELDS if dropout is not None else ():
        if hasattr(config, field):
            setattr(config, field, dropout)
    for field in ("num_labels", "id2label", "label2id"):
        if field in kwargs:
            setattr(config, field, kwargs.pop(field))
    try:
        model, info = auto_class.from_pretrained(
            folder, config=config, dtype=torch.float32, use_safetensors=True, output_loading_info=True, **kwargs
        )
    except (ValueError, OSError, RuntimeError) as error:
        raise InputError(folder, f"cannot be loaded as {auto_class.__name__}: {error}") from error
    missing = sorted({*info["missing_keys"], *(key[0] for key in info["mismatched_keys"])})
    backbone = [n for n in missing if n.startswith(model.base_model_prefix + ".") and ".pooler." not in n]
    if backbone:
        raise InputError(folder, f"lacks {len(backbone)} backbone tensors: {', '.join(backbone)}")
    return model, missing


def _draw(model: PreTrainedModel, names: list[str], seed: int) -> None:
    """Fresh values as BERT draws them: N(0, initializer_range), biases 0, norms 1; from seed and name alone."""
    prefix = model_prefix(model.config)
    std = getattr(model.config, "initializer_range", 0.02)
    with torch.no_grad():
        for name in names:
            parameter = model.get_parameter(name)
            if parameter.dim() == 1:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            else:
                generator = torch.Generator().manual_seed(_seed_of(seed, canonical_name(name, prefix)))
                parameter.normal_(0.0, std, generator=generator)


def _seed_of(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:7], "big")


def _adapter_shapes(model: PeftModel) -> dict[str, tuple[int, ...]]:
    return {n: tuple(t.shape) for n, t in get_peft_model_state_dict(model, save_embedding_layers=False).items()}


def _require_same(weights: AdaptedWeights, found: dict[str, tuple], wanted: dict[str, tuple]) -> None:
    problems = [f"{n} is missing" for n in wanted.keys() - found.keys()]
    problems += [f"{n} has no place in the model" for n in found.keys() - wanted.keys()]
    other = [n for n in found.keys() & wanted if found[n] != wanted[n]]
    problems += [f"{n} is {found[n]}, the model's is {wanted[n]}" for n in other]
    if problems:
        raise InputError(weights.folder, f"does not fit the model: {'; '.join(sorted(problems))}")
