"""Packed text as batches for language models: masked blocks, blocks told token by token, blocks with spans taken out.

Whatever is random depends on seed, epoch and block alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from recyclable.data.corruption import Spans, corrupted
from recyclable.data.examples import Batch
from recyclable.data.order import Item
from recyclable.data.packing import Joined, Packed

NO_DOCUMENT = -1
"""The document that padding belongs to."""
Row = dict[str, np.ndarray]


class Blocks(ABC):
    """Some of the packed sequences as examples.

    Args:
        apart: batches say which document each token belongs to, so that none sees another.
    """

    def __init__(self, blocks: Packed | Joined, indices: Sequence[int], seed: int, apart: bool) -> None:
        self._blocks, self._indices, self._seed, self._apart = blocks, indices, seed, apart

    def __len__(self) -> int:
        return len(self._indices)

    def batch(self, items: list[Item]) -> Batch:
        """`input_ids`, `attention_mask` [B, L], `positions`, `targets` [M]; with `apart` also `documents` [B, L].

        Of rows with a decoder's side `decoder_input_ids` and the like too: `positions` are then the decoder's.
        """
        rows = [self._row(epoch, self._indices[index]) for epoch, index in items]
        made: Batch = {}
        for side in ("", "decoder_") if "decoder_input_ids" in rows[0] else ("",):
            ids = [row[f"{side}input_ids"] for row in rows]
            length = max(1, *map(len, ids))  # no model takes texts without any token
            made[f"{side}input_ids"] = _padded(ids, length, 0)
            made[f"{side}attention_mask"] = _padded([np.ones_like(each) for each in ids], length, 0)
            if self._apart:
                made[f"{side}documents"] = _padded([row[f"{side}documents"] for row in rows], length, NO_DOCUMENT)
            places = [row["positions"] + number * length for number, row in enumerate(rows)]
        made["positions"] = torch.from_numpy(np.concatenate(places))
        made["targets"] = torch.from_numpy(np.concatenate([row["targets"] for row in rows]))
        return made

    @abstractmethod
    def _row(self, epoch: int, block: int) -> Row:
        """What one block is in one epoch: all that a batch says of it, unpadded, `positions` within it."""


class MaskedBlocks(Blocks):
    """Tokens masked as BERT does: 80% mask token, 10% a random token, 10% left as is.

    Args:
        probability: that a token is chosen; special tokens never are.
    """

    def __init__(
        self,
        blocks: Packed | Joined,
        tokenizer: PreTrainedTokenizerBase,
        probability: float,
        seed: int,
        indices: Sequence[int],
        apart: bool = False,
    ) -> None:
        super().__init__(blocks, indices, seed, apart)
        self._probability = probability
        self._mask, self._vocabulary = tokenizer.mask_token_id, len(tokenizer)
        self._special = np.array(tokenizer.all_special_ids)

    def _row(self, epoch: int, block: int) -> Row:
        ids = np.array(self._blocks[block])
        random = np.random.default_rng((self._seed, epoch, block))
        chosen = (random.random(len(ids)) < self._probability) & ~np.isin(ids, self._special)
        fate, other = random.random(len(ids)), random.integers(self._vocabulary, size=len(ids))
        masked = np.where(chosen & (fate < 0.8), self._mask, ids)
        masked = np.where(chosen & (fate >= 0.9), other, masked)
        positions = np.flatnonzero(chosen)
        row = {"input_ids": masked, "positions": positions, "targets": ids[positions]}
        return row | {"documents": self._blocks.documents(block)} if self._apart else row


class CausalBlocks(Blocks):
    """Every token told from those before it; with `apart` from those before it in its own document."""

    def __init__(self, blocks: Packed | Joined, indices: Sequence[int], apart: bool) -> None:
        super().__init__(blocks, indices, 0, apart)

    def _row(self, epoch: int, block: int) -> Row:
        ids = self._blocks[block]
        if not self._apart:
            return {"input_ids": ids, "positions": np.arange(len(ids) - 1), "targets": ids[1:]}
        documents = self._blocks.documents(block)
        positions = np.flatnonzero(documents[1:] == documents[:-1])
        return {"input_ids": ids, "documents": documents, "positions": positions, "targets": ids[positions + 1]}


class SpanBlocks(Blocks):
    """Spans of text taken out for the decoder to tell (Raffel et al. 2020); with `apart` in each document by itself.

    Args:
        spans: how they are taken out.
        end: the token that ends a text on both sides.
        start: what a decoder begins with.
    """

    def __init__(
        self,
        blocks: Packed | Joined,
        spans: Spans,
        end: int,
        start: int,
        seed: int,
        indices: Sequence[int],
        apart: bool,
    ) -> None:
        super().__init__(blocks, indices, seed, apart)
        self._spans, self._end, self._start = spans, end, start

    def _row(self, epoch: int, block: int) -> Row:
        ids, random = self._blocks[block], np.random.default_rng((self._seed, epoch, block))
        documents = self._blocks.documents(block) if self._apart else np.zeros(len(ids), np.int64)
        read, told, numbers = [], [], (list[np.ndarray](), list[np.ndarray]())
        for number in range(documents[-1] + 1):
            encoder, target = corrupted(ids[documents == number], self._spans, self._end, random)
            read.append(encoder)
            told.append(target)
            for side, tokens in zip(numbers, (encoder, target), strict=True):
                side.append(np.full(len(tokens), number))
        shifted = [np.concatenate([[self._start], target[:-1]])[: len(target)] for target in told]
        targets = np.concatenate(told)
        row = {"input_ids": np.concatenate(read), "decoder_input_ids": np.concatenate(shifted)}
        row |= {"positions": np.arange(len(targets)), "targets": targets}
        return row | dict(zip(("documents", "decoder_documents"), map(np.concatenate, numbers), strict=True))


def _padded(rows: list[np.ndarray], length: int, value: int) -> torch.Tensor:
    """[len(rows), length] int64."""
    padded = np.full((len(rows), length), value, np.int64)
    for number, row in enumerate(rows):
        padded[number, : len(row)] = row
    return torch.from_numpy(padded)
