"""Which modules of a model belong to its task, and what a base keeps of a pooler."""

from __future__ import annotations

from transformers import PreTrainedModel

from recyclable.architectures.names import canonical_name
from recyclable.architectures.structure import saved_buffers
from recyclable.carrying.places import label_heads
from recyclable.weights.base import Base
from recyclable.weights.checkpoint_files import Renamed


def head_modules(model: PreTrainedModel) -> list[str]:
    """Names of the modules that belong to the task: all beside the backbone, and the backbone's pooler.

    A language model's head is the base's: no module of it belongs to the task.
    """
    if model.get_output_embeddings() is not None:
        return []
    return [*label_heads(model), *(["pooler"] if getattr(model.base_model, "pooler", None) is not None else [])]


def untrained_tensors(base: Base, model: PreTrainedModel) -> Renamed:
    """What a base was saved with and pre-training leaves as it is, by its child's names.

    That is the pooler, for which a masked-LM model has no place; buffers, and parameters that are never trained
    (sinusoids of positions), of `model`.
    """
    names = {canonical_name(stored, base.prefix): stored for stored in base.source.names}
    kept = {f"{base.prefix}.{name}": names[name] for name in names if name.startswith("pooler.")}
    fixed = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    for name in (*fixed, *saved_buffers(model)):
        if (stored := names.get(canonical_name(name, base.prefix))) is not None:
            kept[name] = stored
    return Renamed(base.source, kept)
