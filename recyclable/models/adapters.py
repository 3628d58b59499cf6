"""Attaches adapters to unread models by PEFT, their fresh values drawn from seed and kind alone."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from recyclable.adapters.configs import NOTHING, read_adapter_config
from recyclable.carrying.places import adapter_shapes, require_same
from recyclable.errors import InputError
from recyclable.weights.adapted import AdaptedWeights
from recyclable.weights.checkpoint_files import Ranged
from recyclable.weights.sources import fill, is_unread, seed_of


def attach_fresh(model: PreTrainedModel, config: PeftConfig, name: str, seed: int) -> PeftModel:
    """The model with a fresh adapter, everything else frozen.

    Args:
        name: of the kind of tuning; with the seed it decides the fresh values.
    """
    with _drawn_from(seed, name):
        try:
            return get_peft_model(model, config)
        except (ValueError, TypeError) as error:  # no such module, or one of a kind that the adapter cannot go on
            problem = f"found {config.target_modules}: {str(error).removeprefix('target_modules: ')}"
            raise InputError("target_modules", problem) from error


def attach_same(
    model: PreTrainedModel, weights: AdaptedWeights, seed: int, fields: Mapping[str, Any] = NOTHING
) -> nn.Module:
    """The model with a fresh adapter of the very kind that `weights` are, by their own config; as it is for a delta.

    Args:
        fields: values that take the place of those in the adapter's config.
    """
    if weights.manifest.architecture not in (None, type(model).__name__):
        raise InputError(
            weights.folder, f"was tuned as {weights.manifest.architecture}, expected a {type(model).__name__}"
        )
    if not weights.is_adapter:
        return model
    return attach_peft(model, weights.folder, weights.manifest.tuning["tuning"], seed, fields)


def attach_peft(
    model: PreTrainedModel, folder: Path, tuning: str, seed: int, fields: Mapping[str, Any] = NOTHING
) -> PeftModel:
    """The model with a fresh adapter that the PEFT config in `folder` describes.

    DoRA's fresh values depend on the weights: for it they are read now, whole.
    """
    config = read_adapter_config(folder, fields)
    if getattr(config, "use_dora", False):
        fill(model)
    bare = model.device.type == "meta" and not is_unread(model)  # a structure that will never have values
    with _drawn_from(seed, tuning):
        try:
            return get_peft_model(model, config, low_cpu_mem_usage=bare)
        except Exception as error:  # whatever a config of another kind or model makes of this one
            problem = f"does not fit {model.config.model_type} ({type(error).__name__}: {error})"
            raise InputError(folder, problem) from error


def require_adapter_fits(
    folder: Path, file: Ranged, planned: PreTrainedModel, fields: Mapping[str, Any] = NOTHING
) -> None:
    """InputError that lists every tensor of an adapter's file that its own config and the model do not expect so.

    Args:
        folder: where the adapter's config lies.
        planned: the model's structure, on the meta device.
        fields: as for `attach_same`.
    """
    attached = attach_peft(planned, folder, "peft", seed=0, fields=fields)
    require_same(folder, {name: file.shape(name) for name in file.names}, adapter_shapes(attached))


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
