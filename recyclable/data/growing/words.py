"""A corpus as a tokenizer splits it: each word once, as the ids of its pieces, with how often it came."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import datasets
import pyarrow.compute as pc
from tokenizers import Tokenizer
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from recyclable.data.tokenising import batches, between_blanks

MOST = 50_000_000
"""Characters that are read at most."""
LONGEST = 32
"""Characters of a new piece at most: longer ones are not of a language."""
SPACE = "▁"
"""What SentencePiece writes for the space before a word."""
_DIGIT, _DIGITS = re.compile(r"\d"), re.compile(r"\d\d")
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_BATCH = 500  # documents looked up at a time


@dataclass(frozen=True)
class Words:
    """What was read, and how much."""

    counts: dict[tuple[int, ...], int]
    """Ids of a word's pieces -> how often it came."""
    documents: int
    characters: int
    of: int
    """Characters of the whole corpus."""


def count(corpus: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, most: int = MOST, quiet: bool = True) -> Words:
    """The words of a corpus; of one with more than `most` characters, of every so many-th document.

    A word is what the tokenizer's own pre-tokenizer makes. SentencePiece has none: there a word begins anew where it
    marks a space, and where letters, digits and other signs meet, as its trainer has it too. Special tokens, other
    added ones, unknown pieces and lone bytes belong to no word, and digits do not where no old piece has two of them:
    nothing is learned across them.

    Args:
        corpus: has a string column "text", as `load_corpus` returns it.
        quiet: no progress bar.
    """
    backend = backend_of(tokenizer)
    assert backend is not None, "required before"
    lengths = [len_of(batch) for batch in corpus.with_format("arrow").iter(10_000)]
    whole = sum(lengths)
    chosen = corpus.select(range(0, len(corpus), max(1, -(-whole // most))))
    vocabulary = backend.get_vocab(with_added_tokens=True)
    apart = {*backend.get_added_tokens_decoder(), *filter(lambda i: i is not None, [tokenizer.unk_token_id])}
    apart |= {row for piece, row in vocabulary.items() if _BYTE.fullmatch(piece)}
    marked = any(piece.startswith(SPACE) for piece in vocabulary)
    kinds = {row: _kind(piece) for piece, row in vocabulary.items()} if marked else {}
    if not any(_DIGITS.search(piece) for piece, row in vocabulary.items() if row not in apart):
        apart |= {row for piece, row in vocabulary.items() if _DIGIT.search(piece)}
    starts = {row for piece, row in vocabulary.items() if piece.startswith(SPACE)}
    counts: Counter[tuple[int, ...]] = Counter()
    characters = 0
    with tqdm(total=len(chosen), desc="counting words", unit=" documents", disable=quiet) as bar:
        for batch in batches(part for text in _texts(chosen, bar) for part in between_blanks(text)):
            for encoding in backend.encode_batch(batch, add_special_tokens=False):
                counts.update(_words(encoding.ids, encoding.word_ids, apart, starts, kinds))
            characters += sum(map(len, batch))
    return Words(dict(counts), len(chosen), characters, whole)


def backend_of(tokenizer: PreTrainedTokenizerBase) -> Tokenizer | None:
    """A copy of the tokenizer's own that neither cuts nor pads; None where it has none that is known here."""
    if (found := getattr(tokenizer, "backend_tokenizer", None)) is None:
        return None
    copy = Tokenizer.from_str(found.to_str())
    copy.no_truncation()
    copy.no_padding()
    return copy


def len_of(batch: object) -> int:
    """Characters of a batch of documents in Arrow's format."""
    return pc.sum(pc.utf8_length(batch["text"])).as_py() or 0  # type: ignore[index]


def _texts(corpus: datasets.Dataset, bar: tqdm) -> Iterator[str]:
    for table in corpus.with_format("arrow").iter(_BATCH):
        for text in table["text"]:
            yield text.as_py()
            bar.update()


def _kind(piece: str) -> str:
    """What a piece is made of: letters, digits, other signs; nothing where it is but a space."""
    text = piece.removeprefix(SPACE)
    if any(char.isalpha() for char in text):
        return "letters"
    return ("digits" if any(char.isdigit() for char in text) else "signs") if text else ""


def _words(
    ids: list[int], word_ids: list[int | None], apart: set[int], starts: set[int], kinds: dict[int, str]
) -> list[tuple[int, ...]]:
    """The words of a document."""
    found: list[tuple[int, ...]] = []
    word: list[int] = []
    last: int | None = None
    for token, number in zip(ids, word_ids, strict=True):
        if word and (
            number != last or token in starts or token in apart or (kinds and kinds[word[-1]] not in ("", kinds[token]))
        ):
            found.append(tuple(word))
            word = []
        if token not in apart:
            word.append(token)
        last = number
    if word:
        found.append(tuple(word))
    return found
