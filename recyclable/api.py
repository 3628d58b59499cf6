"""From Python: old weights on a new base as a plain model, a teacher's loss for any loop, and the verbs as functions.

The verbs take the keys of their run configs and command lines, and return what `--json` prints. They run in this
process; started on several ranks (by deepspeed or torchrun) every rank calls them alike.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from recyclable import distributed, machine
from recyclable.carrying.carried import Carried
from recyclable.carrying.changes import FoundChanges
from recyclable.carrying.templates import told_template
from recyclable.config.run_file import make_config, read_run_file
from recyclable.data.examples import model_inputs
from recyclable.errors import InputError
from recyclable.models.tasks import read_outdated
from recyclable.objectives.distillation import kd_sum, patient_sum
from recyclable.objectives.teachers import OnlineTeacher, compared_states
from recyclable.objectives.token_distillation import TokenTeacher
from recyclable.objectives.token_teaching import token_teacher_loss, with_positions
from recyclable.recipes.running import run_recipe
from recyclable.resources import default_ds_config
from recyclable.tasks.parts.task import task_of
from recyclable.weights import store as stores
from recyclable.weights.delta import Codec
from recyclable.weights.hashes import sha256_json
from recyclable.weights.manifest import read_manifest
from recyclable.weights.vocabulary import row_count

Run = str | Path | None
"""A run config's file; None: the keys alone."""


def carry(
    weights: str | Path,
    to: str | Path,
    *,
    old_base: str | Path | None = None,
    store: str | Path | None = None,
    allow_unrelated: bool = False,
) -> nn.Module:
    """Old weights on a new base: a plain transformers model, or a PEFT model for an adapter; fp32, in evaluation mode.

    Args:
        weights: adapted weights, a directory or a name in the store.
        to: the base they go onto: their own or a descendant of it.
        old_base: their own base, where the recorded names do not lead there any more and it is needed.

    Says so where the two bases have other chat templates. Raises InputError where `to` is no base for them, or any file
    is not what it claims to be.
    """
    carried = Carried.open(weights, old_base, to, store=store, allow_unrelated=allow_unrelated)
    told_template(carried)
    manifest = carried.weights.manifest
    return read_outdated(carried, task_of(manifest.task), manifest.settings["seed"])


def carry_tokenizer(
    weights: str | Path, to: str | Path, *, store: str | Path | None = None, allow_unrelated: bool = False
) -> PreTrainedTokenizerBase:
    """What reads texts for old weights on a new base, as for `carry`; it cuts them where theirs were cut by default.

    It is the base's, or the one that the weights were tuned with where that reads otherwise.
    """
    carried = Carried.open(weights, None, to, store=store, allow_unrelated=allow_unrelated)
    found = carried.reader.tokenizer()
    if (most := carried.weights.manifest.settings["max_length"]) is not None:
        found.model_max_length = most
    return found


def teacher_loss(
    model: nn.Module,
    weights: str | Path,
    batch: Mapping[str, torch.Tensor],
    *,
    outputs: Any = None,
    old_base: str | Path | None = None,
    store: str | Path | None = None,
    temperature: float = 5.0,
    beta: float = 0.0,
) -> torch.Tensor:
    """T^2 KL(teacher/T || student/T) + beta patient, mean over the batch: the distillation term of arXiv 2305.08702.

    The teacher is the weights' own base with the weights on it. It is loaded at the first call, verified, and kept on
    the model's device for the next, until other weights are asked for or lie at that path.

    Args:
        model: the student; plain, PEFT or wrapped, as long as it takes the batch and has logits of the same labels.
        batch: the tokenizer's tensors [B, L]; `labels` may be among them (of words or pieces: [B, L], -100 for none).
            Where answers are text, labels say which tokens count (`objectives.token_teaching`).
        outputs: what the model said of the batch, where that is known already (with `hidden_states` if beta > 0).
        beta: weight of the patient loss on hidden states.

    Returns a scalar with the student's gradient. Raises InputError where student and teacher do not say alike.
    """
    if not 0 < temperature < math.inf:
        raise InputError("temperature", f"is {temperature}, expected a number above 0")
    if not 0 <= beta < math.inf:
        raise InputError("beta", f"is {beta}, expected 0 or more")
    device = next(model.parameters()).device
    folder = stores.find(weights, store).resolve()
    # the manifest names the content of weights and base: others at the same path are another teacher
    content = sha256_json(vars(read_manifest(folder)))
    teacher = _teacher(folder, content, None if old_base is None else str(old_base), device)
    inputs = {name: tensor.to(device) for name, tensor in batch.items()}
    rows, ids = row_count(teacher.model.config), inputs.get("input_ids")
    if rows is not None and ids is not None and ids.numel() and int(ids.max()) >= rows:
        raise InputError("batch", f"has token {int(ids.max())}, the teacher {rows} rows: it reads another vocabulary")
    if isinstance(teacher, TokenTeacher):
        inputs = with_positions(inputs, teacher.model)
        if outputs is None:
            outputs = model(**model_inputs(inputs), output_hidden_states=beta > 0)
        return token_teacher_loss(outputs, teacher, inputs, temperature, beta)
    teacher.with_states, kind = beta > 0, teacher.kind
    if outputs is None:
        outputs = model(**model_inputs(inputs), output_hidden_states=beta > 0)
    told = teacher.signals(inputs)
    answers = kind.answers(outputs.logits, inputs)
    expected = told.logits.shape
    if answers.shape[-1] != expected[-1]:
        raise InputError("model", f"has {answers.shape[-1]} classes, expected the {expected[-1]} of {folder}")
    if answers.shape != expected:
        raise InputError("model", f"says {list(answers.shape)} of the batch, the teacher {list(expected)}")
    count = max(1, len(kind.rows(told.logits, inputs)))
    loss = temperature**2 * kd_sum(kind, answers, told, temperature, inputs) / count
    if beta:
        assert told.states is not None, "a teacher asked for states tells them"
        if not (getattr(outputs, "decoder_hidden_states", None) or getattr(outputs, "hidden_states", None)):
            raise InputError("outputs", "has no hidden_states, which beta > 0 compares with the teacher's")
        states = compared_states(outputs, inputs, teacher.model.config)
        if states.shape != told.states.shape:
            problem = f"has hidden states {list(states.shape)}, the teacher {list(told.states.shape)}: beta must be 0"
            raise InputError("model", problem)
        loss = loss + beta * patient_sum(states, told.states) / len(told.states)
    return loss


@lru_cache(maxsize=1)
def _teacher(weights: Path, content: str, old_base: str | None, device: torch.device) -> OnlineTeacher | TokenTeacher:
    """The teacher of the last call, as long as all of these stay the same; `content` is what its manifest says."""
    opened = Carried.open(weights, old_base, old_base or read_manifest(weights).base["name"]).at_home
    manifest = opened.weights.manifest
    task = task_of(manifest.task)
    model = read_outdated(opened, task, manifest.settings["seed"]).to(device)
    return TokenTeacher(model, None) if task.kind.over_vocabulary else OnlineTeacher(model, task.kind)


def pretrain(run: Run = None, /, *, deepspeed_config: str | None = None, resume: bool = False, **keys: Any) -> Any:
    """Continual pre-training: base + corpus -> upgraded base; returns its lineage."""
    return _run("pretrain", run, deepspeed_config, resume, keys)


def tune(run: Run = None, /, *, deepspeed_config: str | None = None, resume: bool = False, **keys: Any) -> Any:
    """Base + task -> adapted weights; returns their metrics."""
    return _run("tune", run, deepspeed_config, resume, keys)


def stack(run: Run = None, /, *, deepspeed_config: str | None = None, resume: bool = False, **keys: Any) -> Any:
    """One base + several tasks or seeds -> as many adapters, trained at once; returns each one's metrics."""
    return _run("stack", run, deepspeed_config, resume, keys)


def recycle(run: Run = None, /, *, deepspeed_config: str | None = None, resume: bool = False, **keys: Any) -> Any:
    """Outdated weights + old base + new base + task -> adapted weights of the new base; returns their metrics."""
    return _run("recycle", run, deepspeed_config, resume, keys)


def study(run: Run = None, /, *, deepspeed_config: str | None = None, resume: bool = False, **keys: Any) -> Any:
    """A restartable grid of the three above; returns the report's tables."""
    return _run("study", run, deepspeed_config, resume, keys)


def _run(verb: str, run: Run, deepspeed_config: str | None, resume: bool, keys: dict[str, Any]) -> Any:
    """Read settings as the verb's command does, and run its recipe on this rank."""
    content = {**({} if run is None else read_run_file(run)), **keys}
    read = getattr(import_module(f"recyclable.recipes.{verb}_settings"), f"read_{verb}_settings")
    named, ds_file = verb if run is None else run, deepspeed_config or default_ds_config()
    settings, ds_config = read(content, named), machine.load_ds_config(ds_file)
    with distributed.joined():
        return run_recipe(verb, settings, ds_config, resume, run=named, where=ds_file)


def apply(weights: str | Path | Sequence[str | Path], base: str | Path, out: str | Path, **keys: Any) -> dict[str, Any]:
    """Put outdated weights on a base, without training; returns what `recycled.json` says.

    Args:
        keys: `scale`, `ties`, `dare`, `skip_embeddings`, `align`; and as for `recipes.apply.apply`: `old_base`, `seed`,
            `allow_unrelated`, `task`, `examples`; `store`.
    """
    from recyclable.recipes.apply import apply as recipe

    others = ("old_base", "seed", "allow_unrelated", "task", "examples", "store")
    _require_known("apply", keys, (*FoundChanges.model_fields, *others))
    store, changes = keys.pop("store", None), {key: keys.pop(key) for key in FoundChanges.model_fields if key in keys}
    found = [stores.find(each, store) for each in _listed(weights)]
    return recipe(found, base, Path(out), make_config(FoundChanges, changes, "apply"), **keys)


def evaluate(weights: str | Path | Sequence[str | Path], base: str, task: str, **keys: Any) -> dict[str, Any]:
    """Score adapted weights on a task; returns `runs`, a row per weights; with `[]` for weights, of the base alone.

    Args:
        keys: `old_base`, `split` (default test), `corpus` (a list of texts whose loss is told too), `corpus_length`
            (tokens of their sequences, default 128), `store`.
    """
    from recyclable.recipes.evaluate import evaluate_all

    _require_known("evaluate", keys, ("old_base", "split", "corpus", "corpus_length", "store"))
    store = keys.pop("store", None)
    found = [stores.find(each, store) for each in _listed(weights)]
    return {"runs": evaluate_all(found, base, task, **{"old_base": None, "split": "test", **keys})}


def generate(
    base: str,
    prompts: str | Path | Sequence[str | list[dict[str, Any]]],
    weights: str | Path | None = None,
    *,
    deepspeed_config: str | None = None,
    **keys: Any,
) -> dict[str, Any]:
    """What a base, or weights on it, answer to prompts; returns `rows`, each with its `response`, and more of the run.

    Args:
        prompts: a file, or the texts and conversations (lists of messages) themselves.
        deepspeed_config: the machine; None: fp32, whole on each rank.
        keys: as on the command line: `max_new_tokens`, `do_sample`, `temperature`, `top_p`, `top_k`, `seed`,
            `eval_batch_size`, `out`, `old_base`, `store`, `allow_unrelated`.
    """
    from recyclable.recipes.generate import generate as recipe
    from recyclable.recipes.generate_settings import GenerateSettings
    from recyclable.tasks.parts.asked import given_prompts, read_prompts

    content = {"base": base, **({} if weights is None else {"weights": str(weights)}), **keys}
    settings = make_config(GenerateSettings, content, "generate")
    asked = read_prompts(Path(prompts)) if isinstance(prompts, str | Path) else given_prompts(prompts)
    if deepspeed_config is None:
        return recipe(settings, asked, {})
    with distributed.joined():
        return recipe(settings, asked, machine.load_ds_config(deepspeed_config))


def probe(weights: str | Path, base: str, *, resume: bool = False, **keys: Any) -> dict[str, Any]:
    """Is it worth recycling? Returns verdict, confidence, expected gain and evidence.

    Args:
        keys: as on the command line: `old_base`, `task`, `examples`, `points`, `to`, `allow_unrelated`, `out`, `store`.
    """
    from recyclable.recipes.probe import probe as recipe
    from recyclable.recipes.probe_settings import ProbeSettings

    content = {"weights": str(weights), "base": base, **keys}
    return recipe(make_config(ProbeSettings, content, "probe"), resume)[0]


def plan(model: str | None = None, devices: int | None = None, run: Run = None, **keys: Any) -> dict[str, Any]:
    """What a run would take, memory and time for every ZeRO stage and offload; nothing is loaded but a config.

    Args:
        model: a directory with config.json, that file, or a hub name; None: the run's `base`.
        run: the run config that is planned; its corpus and task are not opened.
        keys: as on the command line: `device`, `device_memory`, `hosts`, `host_memory`, `nvme_path`, `verb`,
            `deepspeed_config`, `mfu`, `scale`, `tokens_per_device`; all others are the run's.

    Returns `regimes`, the name of the `chosen` one, its `ds_config`, and more (docs/planning.md); with `scale` a row
    for each model and number of devices (docs/scaling.md).
    """
    from recyclable.recipes.plan import plan as one_size
    from recyclable.recipes.plan_scale import plan_scale
    from recyclable.recipes.plan_settings import PlanSettings

    own = {key: keys.pop(key) for key in PlanSettings.model_fields if key in keys}
    own |= {} if devices is None else {"devices": devices}
    settings = make_config(PlanSettings, {"model": model, **own}, "plan")
    content = {**({} if run is None else read_run_file(run)), **keys}
    recipe = plan_scale if settings.scale else one_size
    return recipe(settings, content, "plan" if run is None else run, whole=run is not None)


def _require_known(verb: str, keys: Mapping[str, Any], read: Sequence[str]) -> None:
    """InputError for a key that nothing reads."""
    for key in keys:
        if key not in read:
            raise InputError(verb, f"unknown key {key!r}; {verb} reads {', '.join(sorted(read))}")


def _listed(weights: str | Path | Sequence[str | Path]) -> list[str | Path]:
    return [weights] if isinstance(weights, str | Path) else list(weights)


class Store(stores.Store):
    """Adapted weights by name, in a directory; None is RECYCLABLE_STORE, else ./store."""

    def ls(self) -> list[dict[str, Any]]:
        """A row per entry."""
        from recyclable.recipes.store_list import rows

        return rows(self)

    def add(
        self,
        name: str,
        tuned: str | Path,
        base: str | None = None,
        *,
        codec: str | None = None,
        rank: int | None = None,
        task: str | None = None,
        labels: Sequence[str] | None = None,
        max_length: int | None = None,
        tokenizer: str | Path | None = None,
    ) -> dict[str, Any]:
        """Add a tuned checkpoint, a PEFT adapter or a run of recyclable's; returns what `show` says of it.

        Args:
            base: what it was tuned on; a run of recyclable's knows.
            codec: of the difference: exact, bf16, lowrank (of this rank) or 1bit.
            task: for the labels' names where the weights have none.
            labels: names in the order of the head's rows; max_length: tokens that texts were cut at; tokenizer: the
                directory of what read them; each where no file tells it.
        """
        from recyclable.recipes.store import add
        from recyclable.recipes.tuned_elsewhere import Told

        told = Told.asked(labels, max_length, None if tokenizer is None else Path(tokenizer))
        return add(self, name, Path(tuned), base, codec=Codec.asked(codec, rank), task=task, told=told)

    def show(self, name: str, base: str | None = None) -> dict[str, Any]:
        """Task, base and its lineage, size, loss and scores of an entry; how `base` is related to the entry's."""
        from recyclable.recipes.store_show import show

        return show(self, name, base)

    def verify(self, names: Sequence[str] = ()) -> dict[str, list[str]]:
        """Entry -> what is damaged in it; of all if none is named."""
        from recyclable.recipes.store import verify

        return verify(self, list(names))

    def export(
        self,
        name: str,
        base: str,
        out: str | Path,
        *,
        merged: bool = True,
        old_base: str | None = None,
        allow_unrelated: bool = False,
    ) -> None:
        """Write an entry on its base or a descendant, as a plain transformers (merged) or a plain PEFT directory."""
        from recyclable.recipes.store import export

        export(self, name, base, Path(out), merged=merged, old_base=old_base, allow_unrelated=allow_unrelated)

    def similar(self, task: str, base: str, examples: int = 200) -> list[dict[str, Any]]:
        """Entries ranked by how well they would start a task, without training."""
        from recyclable.recipes.similar import similar

        return similar(self, task, base, examples)
