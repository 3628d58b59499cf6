"""`recyclable pretrain`: base + corpus -> upgraded base with its lineage."""

from __future__ import annotations

import math
import sys
from typing import Any

import torch
from transformers import PreTrainedModel

from recyclable import models
from recyclable.config import PretrainConfig
from recyclable.data.corpus import Packed, load_corpus, pack
from recyclable.data.examples import Examples, MaskedBlocks
from recyclable.data.packing import tokenizer_digest
from recyclable.errors import InputError
from recyclable.objectives.lm_distillation import LMDistillation, MaskedLMTeacher
from recyclable.objectives.masked_lm import MaskedLM
from recyclable.objectives.objective import Objective
from recyclable.training import distributed, rundir
from recyclable.training.evaluation import mean_losses
from recyclable.training.loop import Evaluate, Outcome, train
from recyclable.weights import lineage
from recyclable.weights.base import Base
from recyclable.weights.checkpoint_files import SafetensorsFile
from recyclable.weights.files import write_checkpoint, write_json
from recyclable.weights.fingerprint import fingerprint
from recyclable.weights.vocabulary import copy_tokenizer, load_tokenizer

_HELDOUT_SHARE = 0.02


def pretrain(config: PretrainConfig, ds_config: dict[str, Any], resume: bool = False) -> dict[str, Any]:
    """Train a base further on fresh text by masked language modelling; returns the lineage it writes.

    A teacher, if there is one, is asked about the same masked tokens.
    """
    folder = models.locate(config.base)
    parent = Base(folder)
    tokenizer = load_tokenizer(folder)
    if tokenizer.mask_token_id is None:
        raise InputError(folder, "its tokenizer has no mask token, expected a masked language model")
    models.require_length(folder, config.max_length)
    teacher = _teacher(config, parent, tokenizer)
    training, heldout, digest = _blocks(config, tokenizer)
    if len(training) < distributed.world_size():
        raise InputError("corpus", f"{len(training)} sequences for {distributed.world_size()} ranks")
    model, fresh = models.masked_lm(parent, config.mlm_head, config.seed, config.dropout)
    if not rundir.claim(config, lineage.FILE, resume):
        return lineage.read_lineage(config.out)

    def evaluate(engine) -> dict[str, float]:
        loss = mean_losses(engine, heldout, config.eval_batch_size)["mlm"]
        return {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}

    head_steps = (config.max_steps // 10 if config.mlm_head_steps is None else config.mlm_head_steps) if fresh else 0
    if head_steps and not list((config.out / "checkpoints").glob("step-*/complete.json")):
        head = _trained_head(parent, head_steps, training, evaluate, config, ds_config)
        models.start_from(model, head, {name: name for name in head.names})
    label = f"pretrain {config.out.name}"
    objective = _objective(model, teacher, config)
    outcome = train(objective, training, evaluate, config, ds_config, out=config.out, resume=resume, label=label)
    _save(type(model).__name__, outcome, parent, config, head_steps, digest)
    rundir.clear_scratch(config.out)
    return lineage.read_lineage(config.out)


def _teacher(config: PretrainConfig, parent: Base, tokenizer) -> MaskedLMTeacher | None:
    """The teacher that `config` asks for; InputError when it cannot teach a child of `parent`."""
    if config.teacher is None:
        return None
    folder = models.locate(config.teacher)
    own, found = tokenizer_digest(tokenizer), tokenizer_digest(load_tokenizer(folder))
    if found != own:
        problem = f"{folder} has another tokenizer ({found[:12]}) than {parent.folder} ({own[:12]}), expected the same"
        raise InputError("teacher", problem)
    models.require_length(folder, config.max_length)
    model, missing = models.masked_lm(folder, "auto", config.seed, None)
    if missing:
        raise InputError("teacher", f"{folder} has no trained masked-LM head (lacks {missing[0]})")
    theirs, ours = ((c.num_hidden_layers, c.hidden_size) for c in (model.config, parent.config))
    if config.beta and theirs != ours:
        shapes = "{} layers x {}, base {} x {}".format(*theirs, *ours)
        raise InputError("beta", f"is {config.beta}, but the teacher has {shapes}: expected 0, or one of like shape")
    return MaskedLMTeacher(model, with_states=config.beta > 0)


def _objective(model: PreTrainedModel, teacher: MaskedLMTeacher | None, config: PretrainConfig) -> Objective:
    """The masked tokens alone, or what a teacher says of them as well."""
    if teacher is None:
        return MaskedLM(model)
    return LMDistillation(
        model,
        teacher,
        alpha=config.alpha,
        beta=config.beta,
        temperature=config.temperature,
        divergence=config.divergence,
        mixing=config.mixing,
    )


def _blocks(config: PretrainConfig, tokenizer) -> tuple[Examples, Examples, str]:
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

    def masked(packed: Packed, indices: range) -> MaskedBlocks:
        return MaskedBlocks(packed, tokenizer, config.mlm_probability, config.seed, indices)

    return masked(blocks, range(cut)), masked(heldout, range(first, last)), blocks.digest


def _trained_head(
    parent: Base, steps: int, training: Examples, evaluate: Evaluate, config: PretrainConfig, ds_config: dict[str, Any]
) -> SafetensorsFile:
    """A fresh head's weights, by the model's names, after training alone.

    Gradients through a random head would wreck the backbone first.

    It trains on a model of its own, because ZeRO leaves a model it has partitioned unusable for a second engine.
    """
    model, fresh = models.masked_lm(parent, config.mlm_head, config.seed, config.dropout)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in fresh)
    settings = config.model_copy(
        update={"max_steps": steps, "learning_rate": config.mlm_head_learning_rate, "warmup_steps": 0, "save_every": 0}
    )
    scratch = config.out / "head"
    if distributed.is_main():
        scratch.mkdir(exist_ok=True)
    distributed.barrier()
    outcome = train(
        MaskedLM(model), training, evaluate, settings, ds_config, out=scratch, label=f"head of {config.out.name}"
    )
    head = SafetensorsFile(outcome.tensors)  # stays open when its directory entry goes
    distributed.barrier()
    rundir.clear_scratch(scratch)
    return head


def _save(
    architecture: str, outcome: Outcome, parent: Base, config: PretrainConfig, head_steps: int, corpus_digest: str
) -> None:
    """A plain HF directory: weights, config, tokenizer; `lineage.json` last, it marks the base as whole.

    All ranks write the weights and hash them together.
    """
    dtype, team = getattr(torch, config.dtype), distributed.Ranks()
    trained, pooler = SafetensorsFile(outcome.tensors), models.pooler_tensors(parent)
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
    record = {
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
    distributed.barrier()


def _record(teacher: str | None) -> dict[str, Any] | None:
    """What the lineage says of a teacher."""
    if teacher is None:
        return None
    return {"name": teacher, "fingerprint": fingerprint(Base(models.locate(teacher))).as_dict()}


def _heldout(row: dict[str, float]) -> dict[str, float]:
    return {name: row[name] for name in ("loss", "perplexity")}
