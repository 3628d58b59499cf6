"""A base with its language-model head."""

from __future__ import annotations

from transformers import PreTrainedModel

from recyclable.errors import InputError
from recyclable.models.build import auto_class, draw, unread
from recyclable.weights.base import Base, read_config


def language_model(
    base: Base, head: str, seed: int, dropout: float | None, fresh_head: bool = False
) -> tuple[PreTrainedModel, list[str]]:
    """A base with its language-model head, unread, and the names of the parameters drawn fresh.

    Args:
        head: transformers' AutoModelFor... that has it, e.g. `MaskedLM`.
        fresh_head: draw the head even where the base has one.
    """
    model, missing, other_shape = unread(auto_class(head), base, read_config(base.folder), dropout)
    if other_shape:
        problem = "; ".join(f"{n} is {found}, the model's is {wanted}" for n, (found, wanted) in other_shape.items())
        raise InputError(base.folder, f"cannot be loaded as {type(model).__name__}: {problem}")
    if fresh_head:
        missing = [name for name, _ in model.named_parameters() if not name.startswith(model.base_model_prefix + ".")]
    draw(model, missing, seed)
    return model, missing
