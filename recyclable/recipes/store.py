"""`recyclable store`: adapted weights by name; what comes in, whether it is whole, what goes out."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, PeftType
from peft.utils.other import AuxiliaryTrainingWrapper
from transformers import PretrainedConfig, PreTrainedModel

from recyclable.carrying.carried import Carried
from recyclable.carrying.changes import FoundChanges
from recyclable.carrying.places import canonical_names
from recyclable.errors import InputError
from recyclable.models.tasks import outdated_model
from recyclable.recipes.apply import PROVENANCE, apply
from recyclable.recipes.cards import card_of_weights
from recyclable.recipes.importing import import_weights
from recyclable.recipes.leaving import require_opens, write_generation, write_tokenizer
from recyclable.recipes.store_show import show
from recyclable.recipes.tuned_elsewhere import NOTHING, Told
from recyclable.report.model_card import write_card
from recyclable.tasks.parts.task import load_task, task_of
from recyclable.weights.adapted import AdaptedWeights
from recyclable.weights.base import Base, reason
from recyclable.weights.checkpoint_files import Computed
from recyclable.weights.delta import Codec
from recyclable.weights.durable import new_directory, write_json
from recyclable.weights.files import write_checkpoint
from recyclable.weights.layouts import as_saved
from recyclable.weights.locate import locate
from recyclable.weights.sources import fill
from recyclable.weights.store import Store


def add(
    store: Store,
    name: str,
    tuned: Path,
    base: str | None,
    *,
    codec: Codec | None = None,
    task: str | None = None,
    told: Told = NOTHING,
) -> dict[str, Any]:
    """Add what `tuned` holds (`recipes.importing`) as entry `name`; returns what `show` says of it.

    Args:
        told: what no file says of weights that were tuned elsewhere.
    """
    with store.adding(name) as aside:
        import_weights(tuned, base, aside, name=name, codec=codec, task=load_task(task) if task else None, told=told)
    return show(store, name)


def verify(store: Store, names: list[str]) -> dict[str, list[str]]:
    """Entry -> what is damaged in it; of all entries if none is named."""
    return {name: store.damage(name) for name in names or store.names()}


def export(
    store: Store, name: str, base: str, out: Path, *, merged: bool, old_base: str | None, allow_unrelated: bool
) -> None:
    """Write an entry on `base`, its own or a descendant, as a plain transformers (merged) or a plain PEFT directory."""
    folder = store.path(name)
    adapter = AdaptedWeights(folder, verify=False).is_adapter
    applied = partial(apply, [folder], base, changes=FoundChanges(), old_base=old_base, allow_unrelated=allow_unrelated)
    if adapter and merged:
        try:
            with new_directory(out) as aside:
                record = applied(aside / "peft")
                config = _merge(AdaptedWeights(aside / "peft"), Base(locate(base)), aside)
                shutil.rmtree(aside / "peft")
                carried = Carried.open(folder, old_base, base, allow_unrelated=allow_unrelated)
                (architecture,) = config.architectures
                write_card(card_of_weights(out.name, [carried], record, config, architecture, merged=True), aside)
                write_json(aside / PROVENANCE, record)
        except FileExistsError as error:
            raise InputError(out, "exists and is not empty, expected a new directory") from error
    elif adapter or merged:
        applied(out)
    else:
        raise InputError(name, "is a delta of all weights and no adapter: expected --merged")


def _merge(weights: AdaptedWeights, base: Base, out: Path) -> PretrainedConfig:
    """An adapter folded into its base by peft, in fp32, rounded once to the base's dtypes; returns its config."""
    manifest, carried = weights.manifest, Carried(weights, base, base)
    model = fill(outdated_model(carried, task_of(manifest.task), manifest.settings["seed"])).eval()
    assert isinstance(model, PeftModel)
    if not hasattr(model, "merge_and_unload"):
        kind = PeftType(model.peft_config["default"].peft_type).value
        problem = f"cannot fold this kind of adapter ({kind}) into its base: it adds to the text"
        raise InputError("--merged", problem)
    fold: Any = model.merge_and_unload
    try:
        merged = _unwrapped(fold())
    except Exception as error:  # every kind refuses in its own way
        raise InputError(
            "--merged", f"peft cannot fold this kind of adapter into its base ({reason(error)})"
        ) from error
    names = canonical_names(merged)
    dtypes = {own: base.stored(n).dtype if n in base else merged.dtype for n, own in names.items()}
    layout = {n: (dtype, tuple(merged.get_parameter(n).shape)) for n, dtype in dtypes.items()}

    def read(name: str, start: int, stop: int) -> torch.Tensor:
        return merged.get_parameter(name).detach().reshape(-1)[start:stop].to(dtypes[name])

    write_checkpoint(out, as_saved(merged, Computed(layout, read)))
    merged.config.dtype = next(iter(dtypes.values()))
    merged.config.architectures = [type(merged).__name__]
    write_generation(carried, merged, out)
    merged.config.save_pretrained(out)
    write_tokenizer(carried, out)
    return require_opens(out)


def _unwrapped(model: PreTrainedModel) -> PreTrainedModel:
    """The model without what some kinds leave around modules that were trained whole, which peft saves under its name.

    Args:
        model: merged and unloaded by peft.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, AuxiliaryTrainingWrapper):
            inner = module.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
            model.set_submodule(name, inner)
    return model
