"""Ways to tell a model of packed documents so that none sees another, and which of them holds for a model.

What does it differs by family, and where it does not hold nothing says so: a mask of the wrong kind is ignored, or read
as another. So no way is believed. Each is tried on the very model, with its weights, on a row of text of the length it
trains on, against the same documents read one by one; the first that gives the same states is used, and where none does
packing is refused. The row is tried as one document, too, so that a way that forgets windows shorter than it fails.

Under ZeRO-3 the trial runs in an engine's forward, on every rank the same; no rank holds the whole model.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from recyclable.architectures.heads import EncoderDecoder
from recyclable.data.blocks import NO_DOCUMENT
from recyclable.data.examples import Batch
from recyclable.objectives.token_states import Inputs

_TOLERANCE = 1e-4  # of the largest state: rounding in fp32 is far below, another document's influence far above
Ask = Callable[[dict[str, Any]], torch.Tensor]
"""Inputs of a model's body -> states [B, L, H]."""


@dataclass(frozen=True)
class Way:
    """One way to keep documents apart.

    Args:
        positions: tell `position_ids`, in each document from here on; None leaves them to the model.
        masked: also tell which token sees which, by an additive mask [B, 1, L, L].
        windows: one mask for layers that see all of a document and one for those with a window, by their names.
    """

    positions: int | None = 0
    masked: bool = True
    windows: bool = False

    def __str__(self) -> str:
        said = "masks by kind of layer" if self.windows else "a mask" if self.masked else "no mask"
        return f"{said}, " + ("no positions" if self.positions is None else f"positions from {self.positions}")

    def told(self, batch: Batch, causal: bool, window: int | None, dtype: torch.dtype) -> dict[str, Any]:
        """Inputs of a body for a batch with `documents` [B, L], of an encoder-decoder `decoder_documents` [B, D] too.

        Args:
            causal: whether tokens see only those before them (encoder-decoders: their decoder's do).
            window: how far the layers with a window see.
            dtype: of the masks.
        """
        documents = batch["documents"]
        if "decoder_input_ids" in batch:
            told = batch["decoder_documents"]
            return {
                "input_ids": batch["input_ids"],
                "decoder_input_ids": batch["decoder_input_ids"],
                "attention_mask": _additive(_together(documents, documents), dtype),
                "decoder_attention_mask": _additive(_together(told, told).tril(), dtype),
                "cross_attention_mask": _additive(_together(told, documents), dtype),
            }
        inputs: dict[str, Any] = {"input_ids": batch["input_ids"]}
        if self.positions is not None:
            inputs["position_ids"] = _places(documents) + self.positions
        if self.masked:
            seen = _together(documents, documents)
            seen = seen.tril() if causal else seen
            inputs["attention_mask"] = _additive(seen, dtype)
            if self.windows:
                near = _additive(seen & _near(documents.shape[1], causal, window or 0, documents.device), dtype)
                inputs["attention_mask"] = {"full_attention": inputs["attention_mask"], "sliding_attention": near}
        return inputs


@dataclass(frozen=True)
class Apart:
    """A way that holds for a model's family: `inputs` is what to tell a model of that family of a batch."""

    way: Way
    causal: bool
    window: int | None

    def inputs(self, model: nn.Module) -> Inputs:
        """Of batches with `documents`, for this model, wherever and in whatever precision it will be."""

        def told(batch: Batch) -> dict[str, Any]:
            dtype = next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
            return self.way.told(batch, self.causal, self.window, dtype)

        return told


def apart(
    ask: Ask, body: nn.Module, config: PretrainedConfig, batch: Batch, causal: bool
) -> tuple[Apart | None, dict[str, str]]:
    """The first way that keeps documents apart in this model, None where none does; and what the others did.

    Args:
        ask: the model's body in fp32, in evaluation; all ranks ask the same.
        body: what `ask` runs, for which inputs it takes.
        batch: one row of text as the model will be trained on.
        causal: as in `Way.told`.
    """
    window = getattr(config.get_text_config(), "sliding_window", None)
    trials = [in_documents(batch, window), in_one_document(batch)]
    failed: dict[str, str] = {}
    with torch.no_grad():
        alone = torch.stack([torch.cat([ask(one) for one in separate(trial)], dim=1) for trial in trials])
        for way in _ways(body, config, window):
            try:
                states = torch.stack([ask(way.told(trial, causal, window, alone.dtype)) for trial in trials])
            except Exception as error:  # whatever a family makes of inputs that it does not expect
                failed[str(way)] = f"fails ({type(error).__name__})"
                continue
            difference = ((states - alone).abs().max() / alone.abs().max()).item()
            if difference <= _TOLERANCE:  # false for nan, too
                return Apart(way, causal, window), failed
            failed[str(way)] = f"differs by {difference:.0e}"
    return None, failed


def _ways(body: nn.Module, config: PretrainedConfig, window: int | None) -> list[Way]:
    """Those worth trying: the cheapest first, those that some model would fail at last."""
    if isinstance(body, EncoderDecoder):
        return [Way(positions=None)]
    takes = inspect.signature(body.forward).parameters
    if "position_ids" not in takes and not any(p.kind is p.VAR_KEYWORD for p in takes.values()):
        return [Way(positions=None)]
    ways = [Way(masked=False), Way()]
    if (padding := getattr(config, "pad_token_id", None)) is not None:
        ways.append(Way(positions=padding + 1))  # RoBERTa and its kin count from there
    return [*ways, Way(windows=True)] if window else ways


def in_documents(batch: Batch, window: int | None) -> Batch:
    """A row cut into three documents, the middle one long: longer than a window, where the row has room for that."""
    cut = dict(batch)
    for side in ("", "decoder_") if "decoder_input_ids" in batch else ("",):
        length = batch[f"{side}input_ids"].shape[1]
        middle = min(max(length // 2, (window or 0) + 4), max(length - 6, 1))
        before = (length - middle) // 2
        sizes = torch.tensor([before, middle, length - middle - before])
        cut[f"{side}documents"] = torch.arange(3).repeat_interleave(sizes)[None].to(batch["input_ids"].device)
    return cut


def in_one_document(batch: Batch) -> Batch:
    """A row as it is."""
    sides = ("", "decoder_") if "decoder_input_ids" in batch else ("",)
    return {**batch, **{f"{side}documents": torch.zeros_like(batch[f"{side}input_ids"]) for side in sides}}


def separate(batch: Batch) -> list[dict[str, torch.Tensor]]:
    """The documents of one row, each as a row of its own that a model would be told without any packing."""
    sides = [side for side in ("", "decoder_") if f"{side}input_ids" in batch]
    rows = []
    for number in batch[f"{sides[-1]}documents"].unique().tolist():
        row = {}
        for side in sides:
            row[f"{side}input_ids"] = ids = batch[f"{side}input_ids"][batch[f"{side}documents"] == number][None]
            row[f"{side}attention_mask"] = torch.ones_like(ids)
        rows.append(row)
    return rows


def _together(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """[B, Q, K]: whether a token sees another. Padding sees all, as it must see something; only padding sees it."""
    return (queries[:, :, None] == keys[:, None]) | (queries == NO_DOCUMENT)[:, :, None]


def _near(length: int, causal: bool, window: int, device: torch.device) -> torch.Tensor:
    """[L, L]: whether a token is within the window of another, as transformers counts it."""
    places = torch.arange(length, device=device)
    distance = places[:, None] - places
    return distance < window if causal else distance.abs() <= window


def _additive(seen: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[B, 1, Q, K]: 0 where a token is seen."""
    return torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)[:, None]


def _places(documents: torch.Tensor) -> torch.Tensor:
    """[B, L]: each token's place in its document, from 0."""
    places = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
    starts = torch.ones_like(documents, dtype=torch.bool)
    starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return places - torch.where(starts, places, 0).cummax(dim=1).values
