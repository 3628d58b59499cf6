"""Which modules an adapter goes on, as people name them: names, a regular expression, or every linear module."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING

from recyclable.errors import InputError

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

ALL = "all-linear"
"""PEFT's word for every linear module (GPT-2's Conv1D among them) but the head's; a router is one as well."""
Targets = Collection[str] | str


def require_targets(
    model: PreTrainedModel, targets: Targets | None, field: str = "target_modules", default: Targets | None = None
) -> set[str]:
    """The names of all modules that are meant.

    InputError where names match no module, where a pattern is one that PEFT's files may not have, or where an adapter
    would go on less than what is named: weights that lie in no module of their own, as experts that transformers keeps
    fused. PEFT says nothing as long as one of several names matches.

    Args:
        default: PEFT's choice for the family, taken where no targets are given; empty where it has none.
    """
    from recyclable.architectures.experts import fused_names, fused_weights

    family = model.config.model_type
    if targets is None and default is not None and not default:
        expected = f"expected names of modules{_such_as(model, fused_names(model))}"
        raise InputError(field, f"is left out, and PEFT has no choice for a {family}: {expected}")
    whose = f"is left out, and PEFT's choice for a {family} " if targets is None else ""
    wanted = (default or ()) if targets is None else targets
    require_quick([wanted] if isinstance(wanted, str) else wanted, field)
    if isinstance(wanted, str) and wanted.lower() == ALL:
        if fused := fused_weights(model):
            problem = f"is {ALL}, which leaves out {len(fused)} tensors that are no modules, such as {fused[0]}"
            raise InputError(field, f"{problem} (mixtures of experts): name the modules that it is to go on instead")
        return set(_linear(model))
    names, tensors, meant = [name for name, _ in model.named_modules()], fused_names(model), set()
    for said, nowhere, matches in _one_by_one(wanted, type(model).__name__):
        found = {name for name in names if matches(name)}
        left_out = [t for name, t in tensors.items() if matches(name) or matches(t.rpartition(".")[0])]
        if left_out:
            nowhere = f"which means {left_out[0]} as well, a tensor and not a module, that would be left out"
        if left_out or not found:
            expected = f"expected names of modules alone{_such_as(model, tensors)}"
            raise InputError(field, f"{whose}{said}, {nowhere}: {expected}")
        meant |= found
    return meant


def require_adapted(model: PeftModel, meant: set[str]) -> PeftModel:
    """The model; InputError where PEFT put LoRA on other modules than those that were meant.

    In families whose experts became fused, it takes the names of the former modules for the tensors', in layers that
    have no experts as well, and of a pattern it keeps only how the names that it matches end.

    Args:
        model: with the adapter.
        meant: as `require_targets` returned before the adapter was there.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    plain: PreTrainedModel = model.get_base_model()
    modules = dict(plain.named_modules())
    whole = tuple(f"{name}." for name, module in modules.items() if isinstance(module, ModulesToSaveWrapper))
    adapted = {name for name, module in modules.items() if isinstance(module, BaseTunerLayer)}
    adapted = {name for name in adapted if not name.endswith(".base_layer")}  # a tensor's in another tensor's
    left, more = ({n for n in some if not f"{n}.".startswith(whole)} for some in (meant - adapted, adapted - meant))
    if left or more:
        problems = [f"{name}, which PEFT leaves out" for name in sorted(left)[:1]]
        problems += [f"not {name}, on which PEFT puts an adapter" for name in sorted(more)[:1]]
        found = f"means {', and '.join(problems)} in a {plain.config.model_type}"
        expected = "a list of modules' whole names, none of them ending as that of a former expert"
        raise InputError("target_modules", f"{found}: expected {expected}")
    return model


def require_quick(patterns: Iterable[str], field: str) -> None:
    """InputError for what is no regular expression, or one that may take forever to match."""
    from recyclable.adapters.configs import may_take_forever

    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise InputError(field, f"{pattern!r} is no regular expression: {error}") from error
        if may_take_forever(pattern):
            raise InputError(field, f"{pattern!r} is a pattern that may take forever to match")


def _one_by_one(targets: Targets, kind: str) -> Iterator[tuple[str, str, Callable[[str], bool]]]:
    """Of each target: how it is spoken of, what is said where it matches nothing, and whether it means a name.

    Args:
        kind: the model's class.
    """
    if isinstance(targets, str):
        yield f"is {targets!r}", f"which is the whole name of no module of a {kind}", partial(_is_whole, targets)
        return
    for target in targets:
        yield f"has {target!r}", f"but the name of no module of a {kind} ends so", partial(_ends_in, target)


def _is_whole(pattern: str, name: str) -> bool:
    return re.fullmatch(pattern, name) is not None


def _ends_in(target: str, name: str) -> bool:
    return f".{name}".endswith(f".{target}")


def _linear(model: PreTrainedModel) -> list[str]:
    """The names of all linear modules but the head's."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    inside = {id(module) for module in model.base_model.modules() if module is not head}
    return [n for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D) and id(m) in inside]


def _such_as(model: PreTrainedModel, tensors: Collection[str]) -> str:
    """The ends of linear modules' names that mean no tensor, ready to be read; nothing where there are none."""
    ends = {name.rpartition(".")[2] for name in _linear(model)} - {name.rpartition(".")[2] for name in tensors}
    return f", such as {', '.join(sorted(ends))}" if ends else ""
