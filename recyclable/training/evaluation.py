"""Runs a model over examples shared out to the ranks, and brings the results together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from itertools import chain
from typing import Any

import deepspeed
import numpy as np
import torch

from recyclable import distributed
from recyclable.data.alike import alike
from recyclable.data.examples import Batch, Examples, TaskExamples
from recyclable.weights.team import Team


def to_device(batch: Batch, device: torch.device | str) -> Batch:
    """The batch on the engine's device; the host waits for nothing.

    To a GPU it goes on a stream of its own, so that it does not queue behind what is computed there. What is computed
    from now on waits for it.
    """
    if torch.device(device).type != "cuda":
        return {name: tensor.to(device) for name, tensor in batch.items()}
    now, copying = torch.cuda.current_stream(device), _copying(torch.device(device))
    with torch.cuda.stream(copying):
        pinned = {name: tensor if tensor.is_cuda else tensor.pin_memory() for name, tensor in batch.items()}
        moved = {name: tensor.to(device, non_blocking=True) for name, tensor in pinned.items()}
    now.wait_stream(copying)
    for tensor in moved.values():
        tensor.record_stream(now)  # its memory is not another copy's before that stream is done with it
    return moved


@cache
def _copying(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def predict(
    module: Callable[..., Any],
    examples: TaskExamples,
    batch_size: int,
    device: torch.device | str = "cpu",
    team: Team | None = None,
) -> np.ndarray:
    """Predictions [N, C] (fp32) of `module(batch, predict=True)` for all examples, in their order, on every rank.

    Args:
        team: as in `outputs`.
    """

    def predictions(batch: Batch) -> dict[str, torch.Tensor]:
        return {"": module(batch, predict=True).float()}

    asked = examples.asked
    return outputs(predictions, asked, np.arange(len(asked)), batch_size, device, team)[""].cpu().numpy()


def outputs(
    of_batch: Callable[[Batch], dict[str, torch.Tensor]],
    examples: Examples,
    rows: np.ndarray,
    batch_size: int,
    device: torch.device | str = "cpu",
    team: Team | None = None,
) -> dict[str, torch.Tensor]:
    """Name -> [len(rows), ...] of what `of_batch` says of these examples, in their order, on every rank.

    Each rank computes its share; texts of like length share a batch.

    Args:
        team: None: all ranks; `weights.team.ALONE` for a rank that has a model of its own to ask.
    """
    team = team or distributed.Ranks()
    lengths = getattr(examples, "lengths", np.zeros(len(examples)))[rows]
    found: dict[str, torch.Tensor] = {}
    groups = alike(lengths, torch.device(device).type, batch_size * team.size)
    for places, real in chain.from_iterable(shares(group, batch_size, team) for group in groups):
        with torch.no_grad():
            told = of_batch(to_device(examples.batch([(0, int(row)) for row in rows[places]]), device))
        for name, tensor in told.items():
            if name not in found:
                found[name] = tensor.new_zeros(len(rows), *tensor.shape[1:])
            found[name][places[:real]] = tensor[:real]
    return {name: distributed.sum_over_ranks(tensor) if team.size > 1 else tensor for name, tensor in found.items()}


def mean_losses(engine: deepspeed.DeepSpeedEngine, examples: Examples, batch_size: int) -> dict[str, float | None]:
    """Term -> its mean over all examples, exact whatever the number of ranks; None where none of them counts.

    Masks are those of epoch -1's draw.
    """
    objective, device = engine.module, engine.device
    terms = list(objective.weights)
    summed = torch.zeros(len(terms), dtype=torch.float64, device=device)
    counted = torch.zeros(len(terms), dtype=torch.float64)  # on the host: a GPU would be waited for at every batch
    for rows, real in shares(np.arange(len(examples)), batch_size, distributed.Ranks()):
        batch = examples.batch([(_HELD_OUT_EPOCH, int(row)) for row in rows])
        with torch.no_grad():
            sums = engine(to_device(batch, device))
        if real:
            counts = objective.counts(batch)
            summed += torch.stack([sums[t].double() for t in terms])
            counted += torch.tensor([counts[t] for t in terms])
    sums, counts = distributed.sum_over_ranks(torch.stack([summed, counted.to(device)]))
    return {term: float(s / c) if c else None for term, s, c in zip(terms, sums, counts, strict=True)}


_HELD_OUT_EPOCH = 2**31  # no training run gets there, so held-out masks are never training masks


def shares(order: np.ndarray, batch_size: int, team: Team) -> Iterator[tuple[np.ndarray, int]]:
    """This rank's batches as (rows, how many of them count): all ranks run the same number of forward passes.

    ZeRO-3 gathers parameters in every forward pass, so a rank that has nothing left repeats a row that counts nothing.
    """
    for start in range(0, len(order), batch_size * team.size):
        rows = order[start : start + batch_size * team.size][team.rank :: team.size]
        yield (rows, len(rows)) if len(rows) else (order[:1], 0)
