"""Which modules of a model belong to its task, and what a base keeps of a pooler."""

from __future__ import annotations

from transformers import PreTrainedModel

from recyclable.architectures.names import canonical_name
from recyclable.carrying.places import label_heads
from recyclable.weights.base import Base
from recyclable.weights.checkpoint_files import Renamed


def head_modules(model: PreTrainedModel) -> list[str]:
    """Names of the modules that belong to the task: all beside the backbone, and the backbone's pooler."""
    return [*label_heads(model), *(["pooler"] if getattr(model.base_model, "pooler", None) is not None else [])]


def pooler_tensors(base: Base) -> Renamed:
    """The pooler a base was saved with: a masked-LM model has no place for it, its children should keep it."""
    names = {canonical_name(stored, base.prefix): stored for stored in base.source.names}
    return Renamed(base.source, {f"{base.prefix}.{n}": names[n] for n in names if n.startswith("pooler.")})
