"""What a base is made of by its config alone: its backbone and language model on the meta device, without weights."""

from __future__ import annotations

import copy
import re
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    PretrainedConfig,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.initialization import no_init_weights

from recyclable.architectures.layers import LayerGroups
from recyclable.architectures.names import canonical_name, model_prefix
from recyclable.errors import InputError

if TYPE_CHECKING:  # importing it takes seconds
    from transformers import PreTrainedModel
    from transformers.core_model_loading import WeightTransform


def on_meta(config: PretrainedConfig, auto_class: type[Any] = AutoModel) -> PreTrainedModel:
    """A model of this config on the meta device, buffers included; InputError where the config makes none."""
    config = copy.deepcopy(config)
    config.architectures = config.architectures or []  # transformers runs through them where a type has two backbones
    try:
        with torch.device("meta"), no_init_weights():
            model = auto_class.from_config(config, trust_remote_code=False).eval()
    except Exception as error:  # whatever a family makes of its config
        raise InputError("config.json", f"makes no model: {error}") from error
    model.tie_weights()  # which transformers does as it initialises
    return model


def conversions(model: PreTrainedModel) -> list[WeightTransform]:
    """What transformers does to names and tensors of this family's files as it loads them; they keep state, so anew."""
    return get_model_conversion_mapping(model, add_legacy=False)


def label_tensors(config: PretrainedConfig, auto_class: type[Any]) -> frozenset[str]:
    """The canonical names of a head's tensors that have a row per label; InputError where there is no such head."""
    shapes = []
    for labels in (2, 3):
        config = copy.deepcopy(config)
        config.num_labels = labels
        named = on_meta(config, auto_class).named_parameters()
        shapes.append({canonical_name(name, model_prefix(config)): parameter.shape for name, parameter in named})
    return frozenset(name for name, shape in shapes[0].items() if shape != shapes[1][name])


class Structure:
    """The structure of a base; whatever is asked for is derived once, names are canonical."""

    def __init__(self, config: PretrainedConfig) -> None:
        self.config = config
        self.prefix = model_prefix(config)
        self.parted = False
        """Whether the output embedding has values of its own though the class ties it to the input's: files say so."""

    @cached_property
    def backbone(self) -> PreTrainedModel:
        """The model without a head."""
        return on_meta(self.config)

    @cached_property
    def language_model(self) -> PreTrainedModel | None:
        """The backbone with its language-model head: of an encoder-decoder, masked, or causal; None without any."""
        kinds = AutoModelForMaskedLM, AutoModelForCausalLM
        for auto_class in (AutoModelForSeq2SeqLM,) if self.config.is_encoder_decoder else kinds:
            if type(self.config) in auto_class._model_mapping:
                return on_meta(self.config, auto_class)
        return None

    @cached_property
    def names(self) -> frozenset[str]:
        """Of all that the backbone saves, tied tensors under each of their names."""
        return frozenset(self.backbone.state_dict())

    @cached_property
    def aliases(self) -> dict[str, str]:
        """Another name of a tied parameter of the backbone -> the one that it goes by."""
        own = {id(parameter): name for name, parameter in self.backbone.named_parameters()}
        every = self.backbone.named_parameters(remove_duplicate=False)
        return {name: own[id(parameter)] for name, parameter in every if own[id(parameter)] != name}

    @property
    def whole(self) -> PreTrainedModel:
        """The largest model that a base of this config is a part of: with its language-model head where it has one."""
        return self.language_model or self.backbone

    @cached_property
    def whole_names(self) -> dict[str, torch.Tensor]:
        """The tensors (on the meta device) that files of such a model have today, the backbone's with its prefix."""
        tensors = self.whole.state_dict()
        return tensors if self.language_model else {f"{self.prefix}.{name}": tensor for name, tensor in tensors.items()}

    def is_leftover(self, name: str) -> bool:
        """Whether a tensor in a file is no weight: a buffer that some version of transformers saved."""
        ignored = self.backbone._keys_to_ignore_on_load_unexpected or ()
        named = name.rpartition(".")[2] in self._buffers or any(re.search(pattern, name) for pattern in ignored)
        return named and name not in self.names

    @cached_property
    def _buffers(self) -> frozenset[str]:
        """How names of buffers end."""
        return frozenset(name.rpartition(".")[2] for name, _ in self.backbone.named_buffers())

    @cached_property
    def layers(self) -> LayerGroups:
        """Which layer group a tensor belongs to."""
        return LayerGroups(self.backbone, self.prefix)

    @cached_property
    def head(self) -> frozenset[str]:
        """The language-model head's tensors, where it is the output embedding alone; a head of several layers has none.

        The output embedding goes by its own name here, tied or not.
        """
        if (model := self.language_model) is None or not isinstance(last := model.get_output_embeddings(), nn.Module):
            return frozenset()
        own = {id(parameter) for parameter in last.parameters()}
        beside = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if (canonical := canonical_name(name, self.prefix)) not in self.names:
                beside[canonical] = id(parameter)
        return frozenset(beside) if set(beside.values()) <= own else frozenset()

    @cached_property
    def untied_head(self) -> frozenset[str]:
        """As `head`; without any where the output embedding is the input embedding."""
        if (model := self.language_model) is None or not self.head:
            return frozenset()
        tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
        return frozenset() if tied and not self.parted else self.head

    @cached_property
    def always_tied(self) -> bool:
        """Whether the class ties the output embedding whatever its config says, as T5's and its kin's do."""
        if self.language_model is None or not self.config.is_encoder_decoder:
            return False
        return bool(type(self.config)(tie_word_embeddings=False).tie_word_embeddings)

    @cached_property
    def vocabulary(self) -> frozenset[str]:
        """Tensors that have a row per token: the input embedding, and an output embedding that is a head of its own."""
        try:
            words = self.backbone.get_input_embeddings()
        except NotImplementedError:  # of a family without an embedding of tokens
            return frozenset()
        return self._parameters(words) | self.untied_head if isinstance(words, nn.Module) else frozenset()

    @cached_property
    def embeddings(self) -> frozenset[str]:
        """Tensors whose rows are looked up (tokens, positions, token types), and those of `vocabulary`."""
        found = [module for module in self.backbone.modules() if isinstance(module, nn.Embedding)]
        return self.vocabulary.union(*map(self._parameters, found))

    def _parameters(self, module: nn.Module) -> frozenset[str]:
        wanted = {id(parameter) for parameter in module.parameters()}
        every = self.backbone.named_parameters(remove_duplicate=False)
        return frozenset(name for name, parameter in every if id(parameter) in wanted)

    @property
    def positions(self) -> int | None:
        """How many tokens there are positions for; None without a limit."""
        for name, module in self.backbone.named_modules():
            # RoBERTa and its kin count positions from the padding token's index on: the first rows are never used
            if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
                return len(module.weight) - module.padding_idx - 1
        limit = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        return None if limit is None or limit < 0 else limit  # XLNet says -1


def saved_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """The buffers of a model that are saved with its parameters, by name."""
    saved = model.state_dict(keep_vars=True)
    return {name: buffer for name, buffer in model.named_buffers() if name in saved}


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a layer norm of any kind (RMS norms too)."""
    return isinstance(module, nn.LayerNorm | nn.RMSNorm) or type(module).__name__.endswith("Norm")
