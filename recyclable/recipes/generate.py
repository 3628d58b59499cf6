"""`recyclable generate`: what a base, or adapted weights on it, answer to prompts; batched, over ranks."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from recyclable import distributed
from recyclable.carrying.carried import Carried
from recyclable.carrying.templates import told_template
from recyclable.config.run_file import make_config
from recyclable.data.decoding import Decoding
from recyclable.data.readable import require_embedded
from recyclable.errors import InputError
from recyclable.models.generating import generating_model, tuned_generating_model
from recyclable.recipes.generate_settings import GenerateSettings
from recyclable.tasks.parts.asked import Prompt
from recyclable.training.engine import frozen
from recyclable.training.generation import Generating
from recyclable.training.generation import generate as answered
from recyclable.training.rundir import require_writable
from recyclable.weights.base import Base
from recyclable.weights.durable import write_text
from recyclable.weights.generation_file import FILE
from recyclable.weights.generation_rules import SAMPLING, proposed_sampling, rules_of
from recyclable.weights.locate import locate
from recyclable.weights.reader import Reader

_SEED = 20


def generate(settings: GenerateSettings, prompts: Sequence[Prompt], ds_config: dict[str, Any]) -> dict[str, Any]:
    """What the JSON says: a row per prompt with its `response`, how tokens were chosen, how many; a collective.

    Everything is checked before the model is read.

    Raises InputError.
    """
    require_new(settings.out)
    carried, base = None, None
    if settings.weights is None:
        base = Base(locate(settings.base))
        reader, model = Reader.of(base), generating_model(base)
    else:
        carried = Carried.open(
            settings.weights,
            settings.old_base,
            settings.base,
            store=settings.store,
            allow_unrelated=settings.allow_unrelated,
        )
        told_template(carried)
        reader, model = carried.reader, tuned_generating_model(carried)
    tokenizer = reader.tokenizer()
    asked = [prompt.tokens(tokenizer, reader.config.is_encoder_decoder) for prompt in prompts]
    _require_room(prompts, asked, settings.max_new_tokens, reader)
    require_embedded({"input_ids": asked}, tokenizer, reader.config)
    decoding, rules = _decoding(settings, reader.config), rules_of(reader.config, tokenizer)
    with frozen(Generating(model), ds_config) as (model_on_ranks, device):
        if carried is not None:
            carried.verify(distributed.Ranks())
        begin = time.perf_counter()
        answers = answered(model_on_ranks, asked, decoding, rules, settings.eval_batch_size, device)
    texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
    rows = [{one.column: one.asked, "response": text} for one, text in zip(prompts, texts, strict=True)]
    if (out := settings.out) is not None:
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        distributed.main_writes(lambda: write_text(out, lines))
    read = vars(decoding) if decoding.do_sample else {"max_new_tokens": decoding.max_new_tokens, "do_sample": False}
    return {
        "rows": rows,
        "decoding": read,
        "new_tokens": sum(map(len, answers)),
        "seconds": round(time.perf_counter() - begin, 3),
        "out": None if settings.out is None else str(settings.out),
    }


def require_new(out: Path | None) -> None:
    """InputError unless a file can be made there; a collective."""
    if out is not None and (out.exists() or not out.parent.is_dir()):
        raise InputError(out, "is there already" if out.exists() else "lies in no directory that there is")
    if out is not None:
        require_writable("out", out.parent)


def _require_room(prompts: Sequence[Prompt], asked: Sequence[Sequence[int]], new: int, reader: Reader) -> None:
    """InputError where the model has too few positions for a prompt and its answer."""
    if (limit := reader.limit) is None:
        return
    apart = reader.config.is_encoder_decoder  # which reads in one place and writes in another
    for prompt, tokens in zip(prompts, asked, strict=True):
        if (most := max(len(tokens), new) if apart else len(tokens) + new) > limit:
            problem = f"has {len(tokens)} tokens, with max_new_tokens {new} it needs {most} positions, but"
            raise InputError(prompt.where, f"{problem} {reader.config.name_or_path} has {limit}")


def _decoding(settings: GenerateSettings, config: PretrainedConfig) -> Decoding:
    """How tokens are chosen: what is not told is as the base proposes, or leaves the model's probabilities alone."""
    if not settings.do_sample:
        return Decoding(settings.max_new_tokens)
    told = {name: getattr(settings, name) for name in SAMPLING}
    told = proposed_sampling(config) | {name: value for name, value in told.items() if value is not None}
    # what the base proposes may be wrong
    make_config(GenerateSettings, {"base": settings.base, "do_sample": True, **told}, Path(config.name_or_path) / FILE)
    seed = _SEED if settings.seed is None else settings.seed
    return Decoding(settings.max_new_tokens, do_sample=True, seed=seed, **told)
