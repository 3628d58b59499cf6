"""Token ids of documents of any length in bounded memory: short ones together, a long one window by window.

A tokenizer keeps some 160 bytes for each character that it is given at once. A long document is therefore read in
windows that overlap, and one is left for the next where both cut a stretch of text into the same tokens: what was far
before or behind decides nothing there, so that the tokens are those of the whole document.

They may not be where nothing agrees in a whole overlap: in a "word" of thousands of characters. It is cut there.
Tokenizers without offsets (written in Python) are given texts cut before a blank, as a sentence of its own each.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

WINDOW = 1 << 18
"""Characters; longer documents are read in such windows."""
OVERLAP = 1 << 12
"""Characters that two windows have in common."""
_TOGETHER = 1 << 20  # characters of short documents per call, at most
_DOCUMENTS = 1000  # per call, at most
_AHEAD = 2  # calls whose tokens may wait
_AGREED = 16  # tokens on either side of a seam that both windows have alike
_SEAMS = (4, 5, 3, 6, 2)  # eighths of the overlap where a seam is sought


class Piece(NamedTuple):
    """Token ids of a document, or of a part of it."""

    ids: list[int]
    begins: bool = True
    """Whether the document begins with it."""
    ends: bool = True


def tokenised(tokenizer: PreTrainedTokenizerBase, documents: Iterable[str]) -> Iterator[Piece]:
    """The documents in tokens, in order, none of them special ones.

    A tokenizer in Rust shares the documents of a call out to threads of its own, as many as there are cores, and does
    so with the next ones while the caller has these.
    """
    backend = _backend(tokenizer)
    coming: deque[Future[list[list[int]]]] = deque()
    with ThreadPoolExecutor(1, "tokenising") as thread:
        for batch in batches(documents):
            is_long = len(batch[0]) > WINDOW
            if backend is not None and not is_long:
                coming.append(thread.submit(_encoded, backend, batch))
            while len(coming) > (0 if backend is None or is_long else _AHEAD):
                yield from map(Piece, coming.popleft().result())
            if is_long:
                yield from _pieces(tokenizer, batch[0])
            elif backend is None:
                yield from map(Piece, _ids(tokenizer, batch))
        while coming:
            yield from map(Piece, coming.popleft().result())


def _backend(tokenizer: PreTrainedTokenizerBase) -> Tokenizer | None:
    """The tokenizer in Rust that a call is about, set as the call would set it; None where a call is more than that."""
    kind, plain = type(tokenizer), PreTrainedTokenizerFast
    if not isinstance(tokenizer, plain) or (kind.__call__, kind._encode_plus) != (plain.__call__, plain._encode_plus):
        return None
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = tokenizer.split_special_tokens
    return backend


def _encoded(backend: Tokenizer, texts: list[str]) -> list[list[int]]:
    """As `_ids`, without what that says besides: a fifth less to compute, and hardly any of it in Python."""
    return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]


def batches(documents: Iterable[str]) -> Iterator[list[str]]:
    """As many documents as a tokenizer is given at once; one that is longer than a window is by itself."""
    batch: list[str] = []
    characters = 0
    for document in documents:
        full = len(batch) == _DOCUMENTS or characters + len(document) > _TOGETHER
        if batch and (full or len(document) > WINDOW):
            yield batch
            batch, characters = [], 0
        batch.append(document)
        characters += len(document) if len(document) <= WINDOW else _TOGETHER + 1
    if batch:
        yield batch


def between_blanks(document: str) -> Iterator[str]:
    """A document in parts of a window's length, cut before a blank where there is one."""
    begin = 0
    while len(document) - begin > WINDOW:
        blanks = (at for at in range(begin + WINDOW, begin + WINDOW - OVERLAP, -1) if document[at].isspace())
        end = next(blanks, begin + WINDOW)
        yield document[begin:end]
        begin = end
    yield document[begin:]


def enough(tokenizer: PreTrainedTokenizerBase, texts: list[str], most: int) -> list[str]:
    """The texts, long ones as short as they may be where each is to be cut to `most` tokens: the same tokens stay."""
    return [text if len(text) <= WINDOW else _enough(tokenizer, text, most) for text in texts]


def _enough(tokenizer: PreTrainedTokenizerBase, text: str, most: int) -> str:
    size, from_its_end = WINDOW, tokenizer.truncation_side == "left"
    while size < len(text):
        part = text[-size:] if from_its_end else text[:size]
        if len(_ids(tokenizer, [part])[0]) > 2 * most + _AGREED:  # those near the cut may be others
            return part
        size *= 2
    return text


def _pieces(tokenizer: PreTrainedTokenizerBase, document: str) -> Iterator[Piece]:
    if tokenizer.is_fast:
        parts = _in_windows(tokenizer, document)
    else:
        parts = (_ids(tokenizer, [part])[0] for part in between_blanks(document))
    begins, last = True, next(parts)
    for ids in parts:
        yield Piece(last, begins, ends=False)
        begins, last = False, ids
    yield Piece(last, begins)


def _in_windows(tokenizer: PreTrainedTokenizerBase, document: str) -> Iterator[list[int]]:
    here, first = _Window.read(tokenizer, document, 0), 0
    while here.end < len(document):
        there = _Window.read(tokenizer, document, here.end - OVERLAP)
        found = _seam(here, there)
        if found is None:
            last = bisect_left(here.starts, here.end - OVERLAP // 2)
            there = _Window.read(tokenizer, document, here.starts[last] if last < len(here.starts) else here.end)
            found = last, 0
        last, following = found
        yield here.ids[first:last]
        here, first = there, following
    yield here.ids[first:]


@dataclass(frozen=True)
class _Window:
    """A part of a document in tokens."""

    end: int
    """Its first character behind it."""
    ids: list[int]
    starts: list[int]
    """Where in the document each token begins."""

    @classmethod
    def read(cls, tokenizer: PreTrainedTokenizerBase, document: str, begin: int) -> _Window:
        end = min(begin + WINDOW, len(document))
        options = {"add_special_tokens": False, "return_attention_mask": False, "return_token_type_ids": False}
        read = tokenizer(document[begin:end], **options, return_offsets_mapping=True, verbose=False)
        return cls(end, read["input_ids"], [begin + start for start, _ in read["offset_mapping"]])

    def around(self, token: int) -> list[tuple[int, int]]:
        """The tokens on either side of a place, with where they begin."""
        span = slice(max(0, token - _AGREED), token + _AGREED)
        return list(zip(self.ids[span], self.starts[span], strict=True))


def _seam(here: _Window, there: _Window) -> tuple[int, int] | None:
    """The first token, in either of two windows, behind a place around which both have the same; None: no such."""
    for eighths in _SEAMS:
        place = here.end - OVERLAP + OVERLAP * eighths // 8
        left, right = bisect_left(here.starts, place), bisect_left(there.starts, place)
        agreed = here.around(left)
        if len(agreed) == 2 * _AGREED and agreed == there.around(right):
            return left, right
    return None


def _ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    # verbose=False: no warning about documents longer than the model's limit; they are cut later
    options = {"add_special_tokens": False, "return_attention_mask": False, "return_token_type_ids": False}
    return tokenizer(texts, **options, verbose=False)["input_ids"]
