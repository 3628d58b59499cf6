"""Which tokens packed text has besides its documents': around each of them, and around each sequence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Layout:
    """Which tokens are put around documents in the stream, and around the pieces of it that sequences hold."""

    before: tuple[int, ...] = ()
    """Before every document."""
    after: tuple[int, ...] = ()
    """After every document."""
    between: tuple[int, ...] = ()
    """After every document but the last."""
    begin: tuple[int, ...] = ()
    """How every sequence begins."""
    end: tuple[int, ...] = ()
    """How every sequence ends."""
    cut: tuple[int, ...] = ()
    """In place of the first tokens of a sequence that begins within a document."""


def wrapped(tokenizer: PreTrainedTokenizerBase) -> Layout:
    """For encoders: [begin] + a piece of the stream + [end], documents joined by the end token.

    They are the tokenizer's cls or bos and its sep or eos token, whichever it has.
    """
    end = _first(tokenizer.sep_token_id, tokenizer.eos_token_id)
    return Layout(between=end, begin=_first(tokenizer.cls_token_id, tokenizer.bos_token_id), end=end)


def streamed(tokenizer: PreTrainedTokenizerBase) -> Layout:
    """For decoders: each document as their tokenizer writes it, then its end token; a cut one begins like a whole one.

    What stands before is what the tokenizer itself puts before a text, `bos` for many: so it was trained, and so it
    will be asked. Some tell nothing without it: on text Gemma 3's loss is about twice as high. The end is `eos`, or
    `sep` where there is none.
    """
    bare, dressed = (tokenizer("a", add_special_tokens=added)["input_ids"] for added in (False, True))
    begins = next((at for at in range(len(dressed)) if dressed[at : at + len(bare)] == bare), 0)
    before = tuple(dressed[:begins])
    return Layout(before, _first(tokenizer.eos_token_id, tokenizer.sep_token_id), cut=before)


def _first(*ids: int | None) -> tuple[int, ...]:
    return next(((i,) for i in ids if i is not None), ())
