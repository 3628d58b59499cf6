"""`recyclable pretrain`: base + corpus -> upgraded base with its lineage."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from recyclable import distributed, machine
from recyclable.carrying.putting import start_from
from recyclable.config.settings import CorpusSettings, TrainSettings
from recyclable.data.packing import tokenization_digest
from recyclable.errors import InputError, RunError
from recyclable.lm.parts.apart import prove
from recyclable.lm.parts.kind import LMKind
from recyclable.models.heads import untrained_tensors
from recyclable.objectives.apart import Apart
from recyclable.objectives.objective import Objective
from recyclable.recipes.cards import card_of_upgrade
from recyclable.recipes.pretrain_text import NEW, OLD, Text, read_text
from recyclable.recipes.pretrain_vocabulary import Start, starting
from recyclable.report.model_card import write_card
from recyclable.training import rundir, zero
from recyclable.training.checkpoint.choosing import written
from recyclable.training.engine import set_attention
from recyclable.training.evaluation import mean_losses
from recyclable.training.loop import Outcome, train
from recyclable.weights import lineage
from recyclable.weights.base import Base
from recyclable.weights.checkpoint_files import Computed, Ranged, SafetensorsFile
from recyclable.weights.durable import copy_files, write_json
from recyclable.weights.files import write_checkpoint
from recyclable.weights.fingerprint import fingerprint
from recyclable.weights.finite import is_finite
from recyclable.weights.generation_file import FILE as GENERATION_FILE
from recyclable.weights.generation_file import read_generation
from recyclable.weights.layouts import as_saved
from recyclable.weights.locate import locate
from recyclable.weights.reader import Reader
from recyclable.weights.remembered import remember, stamp
from recyclable.weights.vocabulary import copy_tokenizer, load_tokenizer


def pretrain(kind: LMKind, ds_config: dict[str, Any], resume: bool = False) -> dict[str, Any]:
    """Train a base further on fresh text as a language model of its kind; returns the lineage it writes.

    A teacher, if there is one, is asked about the same tokens.
    """
    machine.require_logits(kind.logits, ds_config)
    parent = Base(locate(kind.base))
    tokenizer = load_tokenizer(parent.folder)
    kind.require(parent, tokenizer)
    read_generation(parent.folder)  # is handed on: broken, it is refused now
    lineage.read_lineage(parent.folder)  # the same
    Reader.of(parent).require_length(kind.max_length)
    teacher = _teacher(kind, parent, tokenizer)
    with starting(kind, parent, tokenizer, resume) as start:
        return _trained(kind, parent, start, teacher, ds_config, resume)


def _trained(
    kind: LMKind,
    parent: Base,
    start: Start,
    teacher: PreTrainedModel | None,
    ds_config: dict[str, Any],
    resume: bool,
) -> dict[str, Any]:
    """The run itself, and the lineage it writes."""
    base = start.base
    text = read_text(kind, base, start.tokenizer)
    apart = _apart(kind, base, text, ds_config)
    models = {"base": parent, **({"teacher": Base(locate(kind.teacher))} if kind.teacher else {})}
    teachers = _apart(kind, models["teacher"], text, ds_config) if kind.teacher else None
    model, fresh = kind.model(base)
    _laid_out(model, Computed(zero.trainable_shapes(model), _unread), base, kind)  # refused now where it cannot be
    with rundir.claim(kind, kind.out, lineage.FILE, resume) as unfinished:
        if not unfinished:
            return _lineage(kind.out)
        start.record(kind.out)

        def evaluate(engine: Any) -> dict[str, float]:
            scores: dict[str, float] = {}
            for which, examples in text.heldout.items():
                loss = mean_losses(engine, examples, kind.eval_batch_size)[kind.term]
                if loss is None:
                    found = f"{len(examples)} sequences without a token that is to be told"
                    raise InputError("corpus.heldout", f"found {found}, expected more text to measure a loss on")
                scores |= {f"{which}loss": loss, f"{which}perplexity": math.exp(min(loss, 700.0))}
            return scores

        def trained(objective: Objective, settings: TrainSettings, out: Path, resume: bool, label: str) -> Outcome:
            return train(
                objective,
                text.training,
                evaluate,
                settings,
                ds_config,
                out=out,
                order=text.order,
                reads=reads,
                resume=resume,
                label=label,
            )

        def reads() -> dict[str, str]:
            found = dict(text.reads)
            for name, read in models.items():
                read.hashed.complete(team=distributed.Ranks())
                found |= fingerprint(read).told(name, read if name == "base" else None)
            return found

        alone = kind.head_phase() if fresh else None
        if alone and not (resume and written(kind.out)):
            head = _trained_head(kind, alone, base, apart, trained, resume)
            start_from(model, head, {name: name for name in head.names})
        objective = kind.objective(model, teacher, apart, teachers)
        outcome = trained(objective, kind, kind.out, resume, f"pretrain {kind.out.name}")
        _save(model, outcome, parent, start, kind, alone.max_steps if alone else 0, text, apart)
        rundir.clear_scratch(kind.out)
        return _lineage(kind.out)


def _apart(kind: LMKind, base: Base, text: Text, ds_config: dict[str, Any]) -> Apart | None:
    """How the documents of a sequence are kept apart in a base; None where they need not be. A collective."""
    if kind.attention == "full":
        return None
    tried, _ = kind.model(base)
    set_attention(tried, kind, ds_config)
    found = prove(tried, text.training.batch([(0, 0)]), kind.causal, ds_config, base.folder)
    zero.let_go(tried)  # it would stay beside the model that is trained
    distributed.say(f"documents that share a sequence are kept apart in {base.folder} by {found.way}")
    return found


def _lineage(out: Path) -> dict[str, Any]:
    found = lineage.read_lineage(out)
    assert found is not None, "its file is what marks a run as finished"
    return found


def _teacher(kind: LMKind, parent: Base, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel | None:
    """The teacher that is asked for, unread; InputError when it cannot teach a child of `parent`."""
    if kind.teacher is None:
        return None
    base = Base(locate(kind.teacher))
    own, found = tokenization_digest(tokenizer), tokenization_digest(load_tokenizer(base.folder))
    if found != own:
        others = f"{base.folder} has another tokenizer ({found[:12]}) than {parent.folder} ({own[:12]})"
        raise InputError("teacher", f"{others}, expected the same")
    Reader.of(base).require_length(kind.max_length)
    model = kind.teaching(base)
    theirs, ours = ((c.num_hidden_layers, c.hidden_size) for c in (model.config, parent.config))
    if kind.beta and theirs != ours:
        shapes = "{} layers x {}, base {} x {}".format(*theirs, *ours)
        raise InputError("beta", f"is {kind.beta}, but the teacher has {shapes}: expected 0, or one of like shape")
    return model


def _trained_head(
    kind: LMKind,
    alone: TrainSettings,
    base: Base,
    apart: Apart | None,
    trained: Callable[..., Outcome],
    resume: bool,
) -> SafetensorsFile:
    """A fresh head's weights, by the model's names, after training alone.

    It trains on a model of its own, because ZeRO leaves a model it has partitioned unusable for a second engine.
    """
    model, fresh = kind.model(base)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in fresh)
    scratch = kind.out / "head"
    if distributed.is_main():
        scratch.mkdir(exist_ok=True)
    distributed.barrier()
    outcome = trained(kind.objective(model, None, apart), alone, scratch, resume, f"head of {kind.out.name}")
    head = SafetensorsFile(outcome.tensors)  # stays open when its directory entry goes
    distributed.barrier()
    rundir.clear_scratch(scratch)
    return head


def _laid_out(model: PreTrainedModel, trained: Ranged, base: Base, kind: LMKind) -> Ranged:
    """The child's tensors as files have them: what was trained, by the model's names, and what the base keeps.

    Raises InputError where the model's structure cannot be laid out so; nothing is read.
    """
    dtype, kept = getattr(torch, kind.dtype), untrained_tensors(base, model)
    shapes = {n: source.stored(n).shape for source in (trained, kept) for n in source.names}

    def read(name: str, start: int, stop: int) -> torch.Tensor:
        values = (kept if name in kept else trained).read(name, start, stop).to(dtype)
        if not is_finite(values):
            raise RunError(name, f"is not finite in {kind.dtype}, so that there is no result: see `dtype`")
        return values

    return as_saved(model, Computed({name: (dtype, shape) for name, shape in shapes.items()}, read))


def _unread(name: str, start: int, stop: int) -> torch.Tensor:
    raise AssertionError(f"{name} is asked for before it is trained")


def _save(
    model: PreTrainedModel,
    outcome: Outcome,
    parent: Base,
    start: Start,
    config: LMKind,
    head_steps: int,
    text: Text,
    apart: Apart | None,
) -> None:
    """A plain HF directory: weights, configs, tokenizer; `lineage.json` last, it marks the base as whole.

    All ranks write the weights and hash them together.
    """
    dtype, team = getattr(torch, config.dtype), distributed.Ranks()
    write_checkpoint(config.out, _laid_out(model, SafetensorsFile(outcome.tensors), start.base, config), team)

    def beside() -> None:
        saved = start.base.config
        saved.architectures, saved.dtype = [type(model).__name__], dtype
        saved.save_pretrained(config.out)
        copy_tokenizer(start.tokenizer_folder, config.out, saved)
        _save_generation_config(model, parent.folder, config.out)

    distributed.main_writes(beside)
    child = Base(config.out)
    for base in (parent, child):
        base.hashed.complete(team=team)
    first, last = outcome.history[0], outcome.history[-1]
    record: dict[str, Any] = {
        "format": 1,
        "fingerprint": fingerprint(child).as_dict(),
        "ancestors": lineage.ancestors_for_child(parent.folder, config.base, fingerprint(parent).as_dict()),
        "teacher": _record(config.teacher),
        "corpus": _corpus(config.corpus, text, NEW),
        "steps": config.max_steps,
        **({"skipped_steps": outcome.skipped} if outcome.skipped else {}),
        "head_steps": head_steps,
        "tokens": (config.max_steps - len(outcome.skipped)) * config.train_batch_size * config.max_length,
        "heldout": {"before": _heldout(first, NEW), "after": _heldout(last, NEW)},
        "apart": None if apart is None else str(apart.way),
        "config": config.model_dump(mode="json"),
        **start.told,
    }
    if config.replay is not None:
        record["replay"] = {"corpus": _corpus(config.replay.corpus, text, OLD), "share": config.replay.share}
        record["heldout_replay"] = {"before": _heldout(first, OLD), "after": _heldout(last, OLD)}

    def complete() -> None:
        write_card(card_of_upgrade(config.out.name, record, start.base.config, type(model).__name__), config.out)
        write_json(config.out / lineage.FILE, record)
        remember(config.out, stamp(config.out), record["fingerprint"])

    distributed.main_writes(complete)


def _save_generation_config(model: PreTrainedModel, parent: Path, out: Path) -> None:
    """The parent's, or what transformers makes of the config, where a model generates text."""
    if (parent / GENERATION_FILE).is_file():
        copy_files(parent, out, [GENERATION_FILE])
    elif model.can_generate():
        model.generation_config.save_pretrained(out)


def _record(teacher: str | None) -> dict[str, Any] | None:
    """What the lineage says of a teacher."""
    if teacher is None:
        return None
    return {"name": teacher, "fingerprint": fingerprint(Base(locate(teacher))).as_dict()}


def _corpus(corpus: CorpusSettings, text: Text, which: str) -> dict[str, Any]:
    """What the lineage says of a corpus; of bad rows only where some are left out."""
    left_out = text.left_out[which]
    told = {"left_out": left_out} if left_out else {}
    return {**corpus.model_dump(), "digest": text.digests[which], **told}


def _heldout(row: dict[str, float], which: str) -> dict[str, float]:
    return {name: row[f"{which}{name}"] for name in ("loss", "perplexity")}
