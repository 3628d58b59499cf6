"""A base of which there is nothing but its config: its tensors have names and shapes, and cannot be read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoModel, PretrainedConfig, PreTrainedModel

from recyclable.models.build import structure
from recyclable.weights.base import Base, read_config
from recyclable.weights.checkpoint_files import Source, Stored
from recyclable.weights.locate import locate_config


class _Shapes(Source):
    """A structure's parameters, as a checkpoint in fp32 has them."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}

    @property
    def names(self) -> list[str]:
        return list(self._shapes)

    def stored(self, name: str) -> Stored:
        return Stored(torch.float32, self._shapes[name])

    def read_bytes(self, name: str, start: int, stop: int) -> np.ndarray:
        raise NotImplementedError("of a config alone nothing can be read")


def config_only(base: str | Path) -> Base:
    """A base by its config.json alone, for models to be built of it; of a hub name nothing else is fetched.

    It has the tensors of the class that its config names first, a head's among them if that class has one.
    """
    place = locate_config(base)
    return Base(place, _Shapes(_named_model(read_config(place))))


def _named_model(config: PretrainedConfig) -> PreTrainedModel:
    named = next(iter(config.architectures or []), None)
    known: Any = getattr(transformers, named or "", None)
    is_model = isinstance(known, type) and issubclass(known, PreTrainedModel)
    if is_model and known.config_class is type(config):
        return structure(config, None, named)
    return structure(config, AutoModel)
