"""How well a model tells text: a base, or adapted weights on one, as the language model that the base is.

What tuning, or an upgrade, cost of what the model could before: its loss on text of long ago.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import nn

from recyclable import distributed
from recyclable.carrying.carried import Carried
from recyclable.config.run_file import make_config
from recyclable.config.settings import CorpusSettings, RunSettings
from recyclable.data.bad_rows import BadRows
from recyclable.data.corpus import find_corpus, pack
from recyclable.data.examples import Batch
from recyclable.data.packing import cache_root
from recyclable.disks import keeper
from recyclable.errors import InputError
from recyclable.lm import LM_KINDS
from recyclable.lm.parts.kind import LMKind
from recyclable.models.tasks import outdated_model
from recyclable.objectives.token_loss import TokenLoss
from recyclable.recipes.pretrain_settings import kind_of
from recyclable.tasks.parts.task import task_of
from recyclable.training.engine import frozen
from recyclable.training.evaluation import outputs
from recyclable.weights.base import Base
from recyclable.weights.durable import write_json
from recyclable.weights.locate import locate
from recyclable.weights.reader import Reader
from recyclable.weights.vocabulary import load_tokenizer

RESULT = "text_loss.json"


class TextLossSettings(RunSettings):
    """What is told, and by whom."""

    base: str
    """The model, or what the weights are on."""
    weights: str | None = None
    """Adapted weights for a task whose answers are text; null: the base alone."""
    old_base: str | None = None
    """Their own base, where the recorded names do not lead there any more."""
    texts: dict[str, CorpusSettings]
    """Name -> corpus, of which `train` is told."""
    max_sequences: int | None = Field(256, gt=0)
    """The first so many sequences of `max_length` tokens of each corpus; null: all."""
    eval_batch_size: int = Field(16, gt=0)


def text_loss(settings: TextLossSettings, ds_config: dict[str, Any], resume: bool = False) -> dict[str, Any]:
    """As `losses`, kept in a file of the run's directory: name of a text -> mean loss per token, in nats."""
    found = losses(
        settings.texts,
        settings.base,
        weights=settings.weights,
        old_base=settings.old_base,
        max_length=settings.max_length,
        max_sequences=settings.max_sequences,
        batch_size=settings.eval_batch_size,
        ds_config=ds_config,
    )
    if distributed.is_main():
        settings.out.mkdir(parents=True, exist_ok=True)
        write_json(settings.out / RESULT, found)
    distributed.barrier()
    return found


def losses(
    texts: Mapping[str, CorpusSettings],
    base: str,
    *,
    weights: str | Path | None = None,
    old_base: str | None = None,
    max_length: int = 128,
    max_sequences: int | None = 256,
    batch_size: int = 16,
    ds_config: Mapping[str, Any] | None = None,
) -> dict[str, float]:
    """Mean loss per token of each text, in nats; a collective.

    Text is packed as in pre-training, documents in one stream, and each sequence is told with all that stands before
    in it. Masked models and those that fill spans are asked about the tokens that one draw takes out, always the same.

    Raises InputError for weights without a language-model head, as those of a classifier are, and for sequences longer
    than the model has positions for.
    """
    opened = Base(locate(base))
    kind, carried = _packing(base, max_length), None
    if weights is None:
        model: nn.Module = kind.teaching(opened)
    else:
        carried = Carried.open(weights, old_base, opened)
        task, settings = task_of(carried.weights.manifest.task), carried.weights.manifest.settings
        if not task.kind.over_vocabulary:
            problem = f"is for {task.problem}, whose answers are no text: it has no language-model head"
            raise InputError(carried.weights.folder, problem)
        model = outdated_model(carried, task, settings["seed"])
    (Reader.of(opened) if carried is None else carried.reader).require_length(max_length)
    tokenizer, found = load_tokenizer(opened.folder), {}
    with frozen(TokenLoss(model), dict(ds_config or {})) as (answers, device):
        if carried is not None:
            carried.verify(distributed.Ranks())
        for name, corpus in texts.items():
            bad = BadRows(corpus.bad_rows)
            with distributed.main_first(keeper(cache_root())) as leads:
                quiet = not sys.stderr.isatty()
                text = find_corpus(corpus.train, text_column=corpus.text_column, quiet=quiet, bad=bad)
                layout = kind.layout(tokenizer)
                packed = pack(text, tokenizer, max_length, layout, where=corpus.train, verified=not leads)
            if bad.counts:
                distributed.say(f"notice: texts.{name}: {bad}")
            wanted = range(min(len(packed), max_sequences or len(packed)))
            examples = kind.examples(packed, tokenizer, opened, wanted)

            def likelihoods(batch: Batch) -> dict[str, torch.Tensor]:
                return {"": answers(batch, predict=True).float()}

            told = outputs(likelihoods, examples, np.arange(len(examples)), batch_size, device)[""].double().sum(0)
            found[name] = float(-told[0] / told[1])
    return found


def _packing(base: str, max_length: int) -> LMKind:
    """The kind of language model that a base is; what makes a run of it is of no use here."""
    run = {"base": base, "corpus": "", "out": ".", "max_steps": 1, "learning_rate": 1.0}
    content = {**run, "attention": "full", "max_length": max_length}
    return make_config(LM_KINDS.get(kind_of(base)), content, base)
