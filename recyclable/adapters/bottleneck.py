"""The bottleneck adapter (Houlsby et al. 2019), which PEFT lacks, registered as the PEFT method BOTTLENECK on import.

A small two-layer network with its own skip connection, put on the output of each sublayer: y + up(act(down(y))).

Source: "Parameter-Efficient Transfer Learning for NLP" (arXiv 1902.00751, section 2 and figure 2); bottleneck 24 as in
"Recyclable Tuning for Continual Pre-training" (arXiv 2305.08702). H: width of the sublayer's output; B: bottleneck.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from peft.config import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.peft_types import PeftType, register_peft_method
from torch import nn
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D

from recyclable.architectures.sublayers import sublayer_ends, suffixes

INIT_STD = 0.02  # the initializer_range of BERT and RoBERTa for their own Linears

_NO_MERGE = "a bottleneck adapter is nonlinear and cannot be merged into its base: save it as an adapter instead"


def _peft_type(name: str = "BOTTLENECK") -> PeftType:
    """The member of PEFT's enum of methods that stands for ours, added on the first call."""
    if name in PeftType.__members__:
        return PeftType[name]
    # register_peft_method wants a member, and an enum with members cannot be subclassed: add one as EnumType does.
    member = str.__new__(PeftType, name)
    member._name_ = member._value_ = name
    vars(member).update(__objclass__=PeftType, _sort_order_=len(PeftType))
    setattr(PeftType, name, member)  # before _member_map_: EnumType refuses to assign a name that is in the map
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    return member


@dataclass
class BottleneckConfig(PeftConfig):
    """Configuration of a bottleneck adapter; raises ValueError on an impossible size or an unknown activation."""

    target_modules: Collection[str] | str | None = None
    """Suffixes of Linear modules, or one regex; None: those that end the sublayers, before dropout and residual sum."""
    bottleneck_size: int = 24
    """Width B of the adapter's hidden layer."""
    activation: str = "gelu"
    """Any activation name that transformers knows."""
    init_weights: bool = True
    """True: the fresh adapter is the identity. False: it is not (for tests)."""
    modules_to_save: list[str] | None = None
    """Other modules to train and save: LayerNorm, classifier, a fresh pooler, ..."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = _peft_type()
        if isinstance(self.target_modules, (set, tuple)):
            self.target_modules = sorted(self.target_modules)  # a set would be saved in another order each time
        if not isinstance(self.bottleneck_size, int) or self.bottleneck_size < 1:
            raise ValueError(f"bottleneck_size: found {self.bottleneck_size!r}, expected a positive integer")
        if self.activation not in ACT2FN:
            raise ValueError(f"activation: found {self.activation!r}, expected one of {', '.join(sorted(ACT2FN))}")


class BottleneckLayer(nn.Module, BaseTunerLayer):
    """A Linear (or Conv1D, GPT-2's) with bottleneck adapters on its output: (..., in) -> (..., H); adapter weights
    (B, H) and (H, B)."""

    adapter_layer_names = ("bottleneck_down", "bottleneck_up")
    other_param_names = ("bottleneck_act",)

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: BottleneckConfig) -> None:
        super().__init__()
        self.base_layer = base_layer
        if not isinstance(self.get_base_layer(), nn.Linear | Conv1D):
            raise TypeError(f"target_modules: found a {type(base_layer).__name__}, expected torch.nn.Linear")
        self.bottleneck_down, self.bottleneck_up, self.bottleneck_act = (nn.ModuleDict() for _ in range(3))
        self.merged_adapters = []
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: BottleneckConfig) -> None:
        """Add one adapter, on the device (meta included) and in the dtype of the base layer."""
        base = self.get_base_layer()
        width = base.nf if isinstance(base, Conv1D) else base.out_features
        assert isinstance(width, int)
        self.bottleneck_down[adapter_name] = nn.Linear(width, config.bottleneck_size)
        self.bottleneck_up[adapter_name] = nn.Linear(config.bottleneck_size, width)
        self.bottleneck_act[adapter_name] = ACT2FN[config.activation]
        self.reset_bottleneck_parameters(adapter_name, config.init_weights)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def reset_bottleneck_parameters(self, adapter_name: str, init_weights: bool = True) -> None:
        """Draw fresh weights in place; also for weights that were created on the meta device and given memory later."""
        down, up = self._linears(adapter_name)
        for linear in (down, up):
            nn.init.normal_(linear.weight, std=INIT_STD)
            nn.init.zeros_(linear.bias)
        if init_weights:
            nn.init.zeros_(up.weight)  # the identity, whatever comes out of down

    def _linears(self, adapter_name: str) -> tuple[nn.Linear, nn.Linear]:
        down, up = self.bottleneck_down[adapter_name], self.bottleneck_up[adapter_name]
        assert isinstance(down, nn.Linear) and isinstance(up, nn.Linear)
        return down, up

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refused with ValueError: no Linear equals a Linear followed by a nonlinear adapter."""
        raise ValueError(_NO_MERGE)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """x (..., in) -> y + sum over active adapters of up(act(down(y))), (..., H), in the dtype of y = base(x)."""
        result = y = self.base_layer(x, *args, **kwargs)
        active = [] if self.disable_adapters else self.active_adapters
        for name in (name for name in active if name in self.bottleneck_down):
            down, up = self._linears(name)
            # PEFT keeps adapters in fp32 on a half-precision base: add in the wider dtype and round once, at the end.
            hidden = self._cast_input_dtype(y, down.weight.dtype)
            result = result + up(self.bottleneck_act[name](down(hidden)))
        return result.to(y.dtype)


class BottleneckModel(BaseTuner):
    """A model whose target Linears are wrapped in BottleneckLayer; made by `peft.get_peft_model`."""

    prefix = "bottleneck_"
    tuner_layer_cls = BottleneckLayer

    def _prepare_adapter_config(self, peft_config: BottleneckConfig, model_config: dict[str, Any]) -> BottleneckConfig:
        if peft_config.target_modules is None:
            ends = sublayer_ends(self.model)
            if not ends:
                raise ValueError(
                    f"target_modules: not given, and where a {model_config.get('model_type')!r}'s sublayers end in a "
                    "Linear module is not to be seen: name those that do"
                )
            peft_config.target_modules = suffixes(self.model, ends)
        return peft_config

    def _create_and_replace(
        self,
        peft_config: BottleneckConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, BottleneckLayer):
            target.update_layer(adapter_name, peft_config)
            return
        layer = BottleneckLayer(target, adapter_name, peft_config)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)  # an additional adapter does not train until it is set active
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT's own looks for child.weight, which a saved RobertaClassificationHead has not, so that unload() fails on
        # it. The rest of it moves adapters to the base's device: update_layer has done that.
        setattr(parent, child_name, new_module)

    def _check_merge_allowed(self) -> None:
        raise ValueError(_NO_MERGE)


def register() -> None:
    """Make PEFT know the method; again after a reload. KeyError if PEFT has another method of this name."""
    known = PEFT_TYPE_TO_TUNER_MAPPING.get(_peft_type())
    if known is not None and known.__module__ == __name__:
        for mapping in (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING):
            mapping.pop(_peft_type(), None)  # classes of an earlier import of this very module
    register_peft_method(name="bottleneck", config_cls=BottleneckConfig, model_cls=BottleneckModel)


register()
