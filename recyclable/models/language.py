"""A base with its language-model head."""

from __future__ import annotations

import copy

from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, PretrainedConfig, PreTrainedModel

from recyclable.errors import InputError
from recyclable.models.build import auto_class, draw, unread
from recyclable.weights.base import Base


def language_model(
    base: Base, head: str, seed: int, dropout: float | None, fresh_head: bool = False
) -> tuple[PreTrainedModel, list[str]]:
    """A base with its language-model head, unread, and the names of the parameters drawn fresh.

    Args:
        head: transformers' AutoModelFor... that has it, e.g. `MaskedLM`.
        fresh_head: draw the head even where the base has one.
    """
    config = copy.deepcopy(base.config)
    if type(config) not in auto_class(head)._model_mapping:
        raise InputError(base.folder, f"is {config.model_type!r}, which has no AutoModelFor{head} in transformers")
    model, missing, other_shape = unread(auto_class(head), base, config, dropout)
    if other_shape:
        problem = "; ".join(f"{n} is {found}, the model's is {wanted}" for n, (found, wanted) in other_shape.items())
        raise InputError(base.folder, f"cannot be loaded as {type(model).__name__}: {problem}")
    own = _head_parameters(model)
    backbone = [name for name in missing if name not in own] if model.base_model is model else []
    if backbone:
        raise base.lacks(backbone)
    missing = own if fresh_head else missing
    draw(model, missing, seed)
    return model, missing


def is_decoder(config: PretrainedConfig) -> bool:
    """Whether a model of this config tells each token from those before it: some encoders have causal classes too."""
    causal, masked = (type(config) in auto._model_mapping for auto in (AutoModelForCausalLM, AutoModelForMaskedLM))
    return causal and not config.is_encoder_decoder and (not masked or bool(getattr(config, "is_decoder", False)))


def require_generates(base: Base) -> None:
    """InputError for a base that is neither decoder nor encoder-decoder."""
    if not (base.config.is_encoder_decoder or is_decoder(base.config)):
        problem = f"is an encoder ({base.config.model_type}), which generates no text"
        raise InputError(base.folder, f"{problem}: expected a decoder or encoder-decoder")


def _head_parameters(model: PreTrainedModel) -> list[str]:
    """Names of what is the head's alone; of a model without a backbone of its own (T5) its last layer's."""
    names = [name for name, _ in model.named_parameters()]
    if model.base_model is not model:
        return [name for name in names if not name.startswith(model.base_model_prefix + ".")]
    last = {id(parameter) for parameter in model.get_output_embeddings().parameters()}
    last -= {id(parameter) for parameter in model.get_input_embeddings().parameters()}
    return [name for name in names if id(model.get_parameter(name)) in last]
