"""Attaches adapters to unread models by PEFT, their fresh values drawn from seed and kind alone."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from recyclable.adapters.configs import NOTHING, read_adapter_config
from recyclable.adapters.text_ends import read_at_ends
from recyclable.carrying.places import PEFT_PREFIX, adapter_shapes, canonical_names, load, only_parameters, require_same
from recyclable.errors import InputError
from recyclable.models.build import start_all
from recyclable.weights.adapted import AdaptedWeights
from recyclable.weights.base import Base, reason
from recyclable.weights.checkpoint_files import Ranged
from recyclable.weights.layouts import former_modules
from recyclable.weights.sources import Unread, fill, is_unread, seed_of


def attach_fresh(model: PreTrainedModel, config: PeftConfig, name: str, seed: int) -> PeftModel:
    """The model with a fresh adapter, everything else frozen.

    It stays unread unless PEFT computes with the base's values: then these are read now, whole.

    Args:
        name: of the kind of tuning; with the seed it decides the fresh values.
    """

    def attached(model: PreTrainedModel) -> PeftModel:
        with _drawn_from(seed, name):
            try:
                return read_at_ends(get_peft_model(model, copy.deepcopy(config)))
            except (ValueError, TypeError) as error:  # no such module, or one of a kind that the adapter cannot go on
                field = "target_modules" if hasattr(config, "target_modules") else "tuning"
                found = getattr(config, field, name)
                problem = f"found {found}: {str(error).removeprefix('target_modules: ')}"
                raise InputError(field, problem) from error

    try:
        computes = is_unread(model) and _computes(partial(attached, copy.deepcopy(model)))[0]
    except InputError:
        raise
    except Exception:  # whatever PEFT computes where there is nothing
        computes = True
    if computes:
        fill(model)
    return attached(model)


def attach_same(
    model: PreTrainedModel, weights: AdaptedWeights, seed: int, fields: Mapping[str, Any] = NOTHING
) -> nn.Module:
    """The model with a fresh adapter of the very kind that `weights` are, by their own config; without one for a delta,
    of which only that is trained which tuning trained.

    Args:
        fields: values that take the place of those in the adapter's config.
    """
    if weights.manifest.architecture not in (None, type(model).__name__):
        raise InputError(
            weights.folder, f"was tuned as {weights.manifest.architecture}, expected a {type(model).__name__}"
        )
    if not weights.is_adapter:
        places = canonical_names(model)
        for untouched in weights.delta.untouched.intersection(places):
            model.get_parameter(places[untouched]).requires_grad_(False)
        return model
    return attach_peft(model, weights.folder, weights.manifest.tuning["tuning"], seed, fields)


def attach_peft(
    model: PreTrainedModel, folder: Path, tuning: str, seed: int, fields: Mapping[str, Any] = NOTHING
) -> PeftModel:
    """The unread model with a fresh adapter that the PEFT config in `folder` describes.

    It stays unread where its adapter is nothing but parameters, whatever the base's values are. Else the base is read
    now, whole: PEFT computes with its values, or keeps state in other places than parameters.
    """
    config = read_adapter_config(folder, fields)
    if is_unread(model) and _wants_values(copy.deepcopy(model), config, folder):
        fill(model)
    with _drawn_from(seed, tuning):
        return _attached(model, config, folder)


def require_adapter_fits(
    folder: Path, file: Ranged, planned: PreTrainedModel, base: Base, fields: Mapping[str, Any] = NOTHING
) -> None:
    """InputError that lists every tensor of an adapter's file that its own config and the model do not expect so.

    An adapter whose file is nothing but parameters is compared by names and shapes. One with more to it is loaded and
    run: only PEFT knows what it makes of the rest.

    Args:
        folder: where the adapter's config lies.
        planned: the model's structure, on the meta device; it is used up.
        base: what the model's values would come from.
        fields: as for `attach_same`.
    """
    former = former_modules((name.removeprefix(PEFT_PREFIX) for name in file.names), base.structure)
    for module, tensor in former.items():
        problem = f"was made on {len(former)} modules that a {base.config.model_type} no longer has"
        raise InputError(
            folder, f"{problem}, such as {module}: it is a part of {tensor} now, which has no place for it"
        )
    found = {name: file.shape(name) for name in file.names}
    structure = copy.deepcopy(planned)
    start_all(planned, base, seed=0)
    config = read_adapter_config(folder, fields)
    if _wants_values(copy.deepcopy(planned), config, folder) and _fits_bare(structure, config, folder, found):
        return
    attached = attach_peft(planned, folder, "peft", seed=0, fields=fields)
    require_same(folder, found, adapter_shapes(attached, found))
    if only_parameters(attached):
        return
    try:
        load(attached, {name: file[name] for name in file.names})
        with torch.no_grad():
            attached.eval()(**_tokens())
    except Exception as error:  # whatever peft or the model makes of these tensors
        raise InputError(folder, f"peft cannot run it ({reason(error)})") from error


def require_trains(model: nn.Module, folder: Path) -> None:
    """InputError where an adapter that PEFT has loaded takes no training step; others are known to.

    Args:
        folder: of the adapter.
    """
    if not isinstance(model, PeftModel) or is_unread(model):
        return
    was_training = model.training
    try:
        with torch.random.fork_rng(devices=[]):
            model.train()(**_tokens())[0].sum().backward()
    except Exception as error:  # as in `require_adapter_fits`
        raise InputError(folder, f"cannot be trained further ({reason(error)})") from error
    finally:
        model.zero_grad()
        model.train(was_training)


def _tokens() -> dict[str, torch.Tensor]:
    """A text for any model."""
    tokens = torch.zeros(1, 4, dtype=torch.long)
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def _fits_bare(structure: PreTrainedModel, config: PeftConfig, folder: Path, found: dict[str, tuple[int, ...]]) -> bool:
    """Whether an adapter that computes with the base's values has nothing but parameters, of these shapes by name."""
    try:
        with _drawn_from(0, ""):
            attached = _attached(structure, copy.deepcopy(config), folder, bare=True)
        require_same(folder, found, adapter_shapes(attached, found))
    except InputError:
        return False
    return only_parameters(attached)


def _attached(model: PreTrainedModel, config: PeftConfig, folder: Path, *, bare: bool = False) -> PeftModel:
    try:
        attached: Any = get_peft_model(model, config, low_cpu_mem_usage=bare)
        if (ranks := getattr(config, "rank_pattern", None)) and hasattr(attached, "resize_modules_by_rank_pattern"):
            attached.resize_modules_by_rank_pattern(ranks, "default")  # AdaLoRA: those that its training ended with
    except Exception as error:  # whatever a config of another kind or model makes of this one
        problem = f"does not fit {model.config.model_type} ({type(error).__name__}: {error})"
        raise InputError(folder, problem) from error
    return read_at_ends(attached)


def _wants_values(model: PreTrainedModel, config: PeftConfig, folder: Path) -> bool:
    """Whether an adapter is more than parameters that are drawn without a look at the base's values.

    It is attached to an unread model, which is used up: then nothing can have computed with what is not there, nothing
    that PEFT saves is anything but a parameter, and nothing of the adapter lacks its values.
    """

    def attached() -> PeftModel:
        with _drawn_from(0, ""):
            return _attached(model, copy.deepcopy(config), folder)

    try:
        computes, found = _computes(attached)
    except InputError:
        return True  # with values there may be none, else it tells what is wrong
    return computes or not only_parameters(found)


def _computes(attached: Callable[[], PeftModel]) -> tuple[bool, PeftModel]:
    """Whether attaching an adapter computed with the base's values, or left out any of its own; and the model."""
    with _Watch() as watch:
        model = attached()
    tensors = [*model.parameters(), *model.buffers()]
    lacking = any(tensor.is_meta and not isinstance(tensor, Unread) for tensor in tensors)
    return watch.looked or lacking, model


class _Watch(TorchDispatchMode):
    """While it lasts: whether anything was computed with values that are not there."""

    looked = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if any(tensor.is_meta for tensor in inputs):
            self.looked = True
        return func(*args, **kwargs)


@contextmanager
def _drawn_from(seed: int, name: str) -> Iterator[None]:
    """PEFT draws from torch's global generator: give it one of this seed and name for a while.

    It draws an adapter's weights and then moves them to where the base's are: the meta device would lose them.
    """
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of settings that peft was given, of names that will change
        torch.manual_seed(seed_of(seed, name))
        with (
            patch.object(nn.Module, "to", lambda module, *_, **__: module),
            patch.object(BaseTunerLayer, "_move_adapter_to_device_of_base_layer", lambda *_, **__: None),
        ):
            yield
