"""`recyclable pretrain`: base + corpus -> upgraded base with its lineage."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from recyclable import distributed
from recyclable.carrying.putting import start_from
from recyclable.config.settings import TrainSettings
from recyclable.data.corpus import load_corpus, pack
from recyclable.data.examples import Examples
from recyclable.data.packing import tokenization_digest
from recyclable.errors import InputError
from recyclable.lm.parts.kind import LMKind
from recyclable.models.heads import pooler_tensors
from recyclable.training import rundir
from recyclable.training.evaluation import mean_losses
from recyclable.training.loop import Evaluate, Outcome, train
from recyclable.weights import lineage
from recyclable.weights.base import Base
from recyclable.weights.checkpoint_files import SafetensorsFile
from recyclable.weights.durable import write_json
from recyclable.weights.files import write_checkpoint
from recyclable.weights.fingerprint import fingerprint
from recyclable.weights.locate import locate
from recyclable.weights.reader import Reader
from recyclable.weights.remembered import remember, stamp
from recyclable.weights.vocabulary import copy_tokenizer, load_tokenizer

_HELDOUT_SHARE = 0.02


def pretrain(kind: LMKind, ds_config: dict[str, Any], resume: bool = False) -> dict[str, Any]:
    """Train a base further on fresh text as a language model of its kind; returns the lineage it writes.

    A teacher, if there is one, is asked about the same tokens.
    """
    parent = Base(locate(kind.base))
    tokenizer = load_tokenizer(parent.folder)
    kind.require(parent, tokenizer)
    Reader.of(parent).require_length(kind.max_length)
    teacher = _teacher(kind, parent, tokenizer)
    training, heldout, digest = _blocks(kind, tokenizer)
    if len(training) < distributed.world_size():
        raise InputError("corpus", f"{len(training)} sequences for {distributed.world_size()} ranks")
    model, fresh = kind.model(parent)
    with rundir.claim(kind, kind.out, lineage.FILE, resume) as unfinished:
        if not unfinished:
            return _lineage(kind.out)

        def evaluate(engine: Any) -> dict[str, float]:
            loss = mean_losses(engine, heldout, kind.eval_batch_size)[kind.term]
            return {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}

        alone = kind.head_phase() if fresh else None
        if alone and not list((kind.out / "checkpoints").glob("step-*/complete.json")):
            head = _trained_head(kind, alone, parent, training, evaluate, ds_config)
            start_from(model, head, {name: name for name in head.names})
        label = f"pretrain {kind.out.name}"
        objective = kind.objective(model, teacher)
        outcome = train(objective, training, evaluate, kind, ds_config, out=kind.out, resume=resume, label=label)
        _save(type(model).__name__, outcome, parent, kind, alone.max_steps if alone else 0, digest)
        rundir.clear_scratch(kind.out)
        return _lineage(kind.out)


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


def _blocks(config: LMKind, tokenizer: PreTrainedTokenizerBase) -> tuple[Examples, Examples, str]:
    """Training and held-out examples, and the digest of the training tokens."""
    corpus, length = config.corpus, config.max_length
    quiet = not (distributed.is_main() and sys.stderr.isatty())
    with distributed.main_first():
        text = load_corpus(corpus.train, text_column=corpus.text_column, quiet=quiet)
        blocks = heldout = pack(text, tokenizer, length, quiet=quiet)
        if corpus.heldout is not None:
            text = load_corpus(corpus.heldout, text_column=corpus.text_column, split="heldout", quiet=quiet)
            heldout = pack(text, tokenizer, length, quiet=quiet)
    cut, first = len(blocks), 0
    if corpus.heldout is None:
        cut = first = len(blocks) - max(1, round(len(blocks) * _HELDOUT_SHARE))
        if cut == 0:
            raise InputError("corpus", "only one sequence, expected another to hold out; or name `heldout`")
    last = min(len(heldout), first + (config.max_heldout_sequences or len(heldout)))

    training = config.examples(blocks, tokenizer, range(cut))
    return training, config.examples(heldout, tokenizer, range(first, last)), blocks.digest


def _trained_head(
    kind: LMKind,
    alone: TrainSettings,
    parent: Base,
    training: Examples,
    evaluate: Evaluate,
    ds_config: dict[str, Any],
) -> SafetensorsFile:
    """A fresh head's weights, by the model's names, after training alone.

    It trains on a model of its own, because ZeRO leaves a model it has partitioned unusable for a second engine.
    """
    model, fresh = kind.model(parent)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in fresh)
    scratch = kind.out / "head"
    if distributed.is_main():
        scratch.mkdir(exist_ok=True)
    distributed.barrier()
    label = f"head of {kind.out.name}"
    outcome = train(kind.objective(model, None), training, evaluate, alone, ds_config, out=scratch, label=label)
    head = SafetensorsFile(outcome.tensors)  # stays open when its directory entry goes
    distributed.barrier()
    rundir.clear_scratch(scratch)
    return head


def _save(
    architecture: str, outcome: Outcome, parent: Base, config: LMKind, head_steps: int, corpus_digest: str
) -> None:
    """A plain HF directory: weights, config, tokenizer; `lineage.json` last, it marks the base as whole.

    All ranks write the weights and hash them together.
    """
    dtype, team = getattr(torch, config.dtype), distributed.Ranks()
    trained, pooler = SafetensorsFile(outcome.tensors), pooler_tensors(parent)
    shapes = {n: source.shape(n) for source in (trained, pooler) for n in source.names}

    def read(name: str, start: int, stop: int) -> torch.Tensor:
        return (pooler if name in pooler else trained).read(name, start, stop).to(dtype)

    write_checkpoint(config.out, {name: (dtype, shape) for name, shape in shapes.items()}, read, team)
    if distributed.is_main():
        parent.config.architectures, parent.config.dtype = [architecture], dtype
        parent.config.save_pretrained(config.out)
        copy_tokenizer(parent.folder, config.out)
    distributed.barrier()
    child = Base(config.out)
    for base in (parent, child):
        base.hashed.complete(team=team)
    first, last = outcome.history[0], outcome.history[-1]
    record: dict[str, Any] = {
        "format": 1,
        "fingerprint": fingerprint(child).as_dict(),
        "ancestors": lineage.ancestors_for_child(parent.folder, config.base, fingerprint(parent).as_dict()),
        "teacher": _record(config.teacher),
        "corpus": {**config.corpus.model_dump(), "digest": corpus_digest},
        "steps": config.max_steps,
        "head_steps": head_steps,
        "tokens": config.max_steps * config.train_batch_size * config.max_length,
        "heldout": {"before": _heldout(first), "after": _heldout(last)},
        "config": config.model_dump(mode="json"),
    }
    if distributed.is_main():
        write_json(config.out / lineage.FILE, record)
        remember(config.out, stamp(config.out), record["fingerprint"])
    distributed.barrier()


def _record(teacher: str | None) -> dict[str, Any] | None:
    """What the lineage says of a teacher."""
    if teacher is None:
        return None
    return {"name": teacher, "fingerprint": fingerprint(Base(locate(teacher))).as_dict()}


def _heldout(row: dict[str, float]) -> dict[str, float]:
    return {name: row[name] for name in ("loss", "perplexity")}
