"""Checkpoints that are damaged, whose writer dies at any file operation, and what writing them costs."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from memory import anonymous_bytes, in_process, peak
from support.faults import DAMAGES, killed_at, loaded, save_one, write_checkpoint

from recyclable.errors import InputError

EVERY_S = 600.0
"""Between the checkpoints that the share of blocked time is told for."""
_RANKS = 3
_SHAPE = {"hidden_size": 768, "intermediate_size": 2048, "num_attention_heads": 12, "vocab_size": 16000}


def corrupted(folder: Path, count: int, tell: Callable[[], None]) -> dict[str, int]:
    """{"tried", "wrongly_loaded"}: the newest of two checkpoints of three ranks is damaged in all ways in turn.

    Right is to take the older one, with its very values.
    """
    wrong = 0
    for number in range(count):
        out = folder / str(number)
        for step in (4, 8):
            newest = write_checkpoint(out, step, ranks=_RANKS)
        DAMAGES[number % len(DAMAGES)](newest, random.Random(number))
        wrong += _taken(out) != 4
        shutil.rmtree(out)
        tell()
    return {"tried": count, "wrongly_loaded": wrong}


def file_operations(folder: Path, tell: Callable[[], None]) -> dict[str, int]:
    """{"tried", "resumed"}: the writer is killed at each open, write, sync, rename and removal of a save in turn.

    Resumed: the run goes on from the older checkpoint or the new one, whole, and its next save is whole as well.
    """
    tried = resumed = 0
    killed = True
    while killed:
        out = folder / str(tried)
        for step in (2, 4):
            write_checkpoint(out, step)
        killed = killed_at(tried + 1, out, lambda out=out: save_one(out, 6))
        if killed:
            tried += 1
            taken = _taken(out)
            save_one(out, 8)
            resumed += taken in (4, 6) and _taken(out) == 8
        shutil.rmtree(out)
        tell()
    return {"tried": tried, "resumed": resumed}


def _taken(out: Path) -> int | None:
    """The step gone on from; None for none, -1 where it is not that step's state."""
    with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing):
        try:
            return loaded(out)
        except AssertionError:
            return -1
        except InputError:
            return None


def save(folder: Path, quick: bool) -> dict[str, float]:
    """{"blocked_share", "mb_per_s_ratio", "extra_memory_ratio"} of a decoder's training on one rank, ZeRO-2.

    Blocked is from the step's end until training goes on, of 600 s; the speed is that of the whole checkpoint, from
    then until it is marked and renamed, beside `safetensors.torch.save_file` and a sync of the same tensors; the memory
    is the most that the process takes beside what it had, over the bytes of weights and moments saved. Medians.
    """
    found, _ = in_process(_saved, folder, quick)
    return found


def _saved(folder: Path, quick: bool) -> dict[str, float]:
    from safetensors.torch import save_file
    from savings import causal_batch
    from transformers import LlamaConfig, LlamaForCausalLM

    from recyclable import distributed
    from recyclable.config.settings import TrainSettings
    from recyclable.objectives.token_loss import TokenLoss
    from recyclable.training import states
    from recyclable.training.checkpoint.record import Progress, Record
    from recyclable.training.checkpoint.saving import Saver
    from recyclable.training.engine import engine_for
    from recyclable.weights.durable import sync

    layers, times = (2, 3) if quick else (8, 5)
    distributed.init()
    settings = TrainSettings(out=folder, max_steps=1, learning_rate=1e-3, train_batch_size=1, max_length=64)
    with contextlib.redirect_stdout(sys.stderr):
        model = LlamaForCausalLM(LlamaConfig(**_SHAPE, num_hidden_layers=layers, max_position_embeddings=64))
        ds_config = {"zero_optimization": {"stage": 2, "reduce_bucket_size": 5_000_000}}
        blocked, extra, ours, plain = [], [], [], []
        with engine_for(TokenLoss(model, "clm"), settings, ds_config, folder) as engine, Saver(folder, 1) as saver:
            for step in range(1, times + 1):
                loss = engine(causal_batch(1, 64, seed=step))["clm"]
                engine.backward(loss)
                engine.step()
                del loss
                record = Record(Progress(step), {}, states.trained_shapes(engine), {}, 2, "fp32", 1, 1)
                before = anonymous_bytes()
                with peak() as most:
                    with _timed(blocked):
                        saver.save(record, states.copies(engine))
                    with _timed(ours):
                        saver.wait()
                pieces = states.copies(engine)
                tensors = {f"{kind}:{p.name}@{p.start}": t for p in pieces for kind, t in p.tensors.items()}
                extra.append((most[0] - before) / sum(tensor.nbytes for tensor in tensors.values()))
                file = folder / "plain.safetensors"
                with _timed(plain):
                    save_file(tensors, file)
                    sync(file)
                file.unlink()
                del pieces, tensors
    distributed.shutdown()
    return {
        "blocked_share": statistics.median(blocked) / EVERY_S,
        "mb_per_s_ratio": statistics.median(plain) / statistics.median(ours),
        "extra_memory_ratio": statistics.median(extra),
    }


@contextmanager
def _timed(seconds: list[float]) -> Iterator[Any]:
    begin = time.perf_counter()
    yield
    seconds.append(time.perf_counter() - begin)
