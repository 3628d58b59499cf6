"""Rows of tokens some of which are to be told from those before them: what they are, and batches of them.

A batch has `input_ids` and `attention_mask` [B, L], for an encoder-decoder `decoder_input_ids` and
`decoder_attention_mask` [B, Ld] as well, padded on the right; `positions` [M], flat indices into B x L (B x Ld) of the
states that tell; and `targets` [M], the tokens that they tell.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from recyclable.data.examples import Batch, multiple_for


@dataclass(frozen=True)
class TokenRow:
    """A text in tokens."""

    ids: list[int]
    """What a decoder reads; of an encoder-decoder the token that begins answers, and the answer."""
    told: Sequence[int]
    """Which of them it is to tell, each from all before it: places in `ids`, ascending, from 1 on."""
    source: list[int] | None = None
    """What an encoder reads."""

    def __len__(self) -> int:
        return len(self.ids) + len(self.source or ())

    @property
    def targets(self) -> list[int]:
        """The tokens to be told."""
        return [self.ids[place] for place in self.told]

    def digest(self) -> bytes:
        """What identifies it to a model, 16 bytes of SHA-256."""
        return hashlib.sha256(json.dumps([self.ids, list(self.told), self.source]).encode()).digest()[:16]


def batch_of(rows: Sequence[TokenRow], pad: int, max_length: int | None) -> Batch:
    """Rows side by side; each tensor as long as the longest of them needs, in multiples of 8 where `max_length` allows.

    Args:
        pad: the token that stands where there is none; nothing looks at it.
    """
    sources = [row.source for row in rows if row.source is not None]
    if sources:
        decoded = [row.ids[: max(1, len(row.ids) - 1)] for row in rows]  # an answer's last token is told, not read
        inputs = {**_padded(sources, "", pad, max_length), **_padded(decoded, "decoder_", pad, max_length)}
    else:
        inputs = _padded([row.ids for row in rows], "", pad, max_length)
    length = inputs["decoder_input_ids" if sources else "input_ids"].shape[1]
    positions = [number * length + place - 1 for number, row in enumerate(rows) for place in row.told]
    targets = [token for row in rows for token in row.targets]
    return {**inputs, "positions": torch.tensor(positions).long(), "targets": torch.tensor(targets).long()}


def full_batch(rows: int, length: int, has_encoder: bool) -> Batch:
    """The largest batch of so many rows: as many tokens as they may have, all of them told; its values mean nothing."""
    ids, source = [0] * length, [0] * length if has_encoder else None
    return batch_of([TokenRow(ids, range(1, length), source)] * rows, 0, length)


def padding(tokenizer: PreTrainedTokenizerBase) -> int:
    """A token to pad with, whichever there is."""
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(token for token in known if token is not None)


def _padded(texts: Sequence[list[int]], prefix: str, pad: int, max_length: int | None) -> Batch:
    longest = max(map(len, texts))
    multiple = multiple_for(longest, max_length)
    length = -(-longest // multiple) * multiple
    ids = torch.full((len(texts), length), pad)
    mask = torch.zeros_like(ids)
    for row, text in enumerate(texts):
        ids[row, : len(text)] = torch.tensor(text)
        mask[row, : len(text)] = 1
    return {f"{prefix}input_ids": ids, f"{prefix}attention_mask": mask}
