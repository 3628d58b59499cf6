"""The bottleneck adapter (Houlsby et al. 2019, arXiv 1902.00751) by `recyclable.adapters.bottleneck`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from recyclable.tunings.parts.tuning import Tuning

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


class Bottleneck(Tuning):
    """Small networks behind each sublayer; layer norms are trained as well, the head is saved whole."""

    tuning: Literal["bottleneck"] = "bottleneck"
    bottleneck_size: int = Field(24, gt=0, le=1 << 16)
    target_modules: list[str] | str | None = None
    """Linear modules the adapter attaches to, by the ends of their names or by a regular expression for whole names;
    null: the ends of the architecture's sublayers."""

    def attach(self, model: PreTrainedModel, task_type: str, seed: int) -> nn.Module:
        """A PEFT model."""
        from recyclable.adapters.bottleneck import BottleneckConfig
        from recyclable.models.adapters import attach_fresh
        from recyclable.models.heads import head_modules
        from recyclable.tunings.parts.targets import require_targets

        require_targets(model, self.target_modules)
        heads = head_modules(model)
        config = BottleneckConfig(
            task_type=task_type,
            bottleneck_size=self.bottleneck_size,
            target_modules=self.target_modules,
            modules_to_save=[*heads, *_norms(model, heads)],
        )
        return attach_fresh(model, config, self.tuning, seed)


def _norms(model: PreTrainedModel, heads: list[str]) -> list[str]:
    """What PEFT is to look for at the end of names to find the backbone's norms, and none inside the head's modules."""
    from recyclable.architectures.structure import is_norm

    inside: list[str] = []
    outside: list[str] = []
    for name, module in model.named_modules():
        if is_norm(module):
            (inside if set(name.split(".")) & set(heads) else outside).append(name)
    ends = {name.rpartition(".")[2] for name in outside}
    return sorted(ends) if not any(name.endswith(tuple(ends)) for name in inside) else outside
