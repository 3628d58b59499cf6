"""Experts that transformers keeps fused: tensors of several matrices, by their names and those of former modules."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter

_CONVOLUTIONS = ("Conv1d", "Conv2d", "Conv3d")


def fused_weights(model: nn.Module) -> list[str]:
    """The parameters of more than two dimensions that are no convolution's: several matrices in one tensor."""
    return [
        f"{name}.{own}" if name else own
        for name, module in model.named_modules()
        for own, parameter in module.named_parameters(recurse=False)
        if parameter.ndim > 2 and type(module).__name__ not in _CONVOLUTIONS
    ]


def fused_names(model: PreTrainedModel) -> dict[str, str]:
    """Every name by which people know fused weights -> the tensor: its own, and those of the modules that files have.

    Of the modules one by one, the first expert's is there: experts.0.w1 and experts.w1 for experts.gate_up_proj.
    """
    converters = [c for c in get_model_conversion_mapping(model, add_legacy=False) if isinstance(c, WeightConverter)]
    names = {}
    for tensor in fused_weights(model):
        names[tensor] = tensor
        for converter in converters:
            for end in (end for end in converter.target_patterns if tensor.endswith(end)):
                for source in (source.removesuffix(".weight") for source in converter.source_patterns):
                    for former in (source.replace("*", "0"), source.replace("*.", "")):
                        names[tensor.removesuffix(end) + former.replace("\\", "")] = tensor
    return names
