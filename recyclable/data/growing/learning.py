"""Learns new pieces from a corpus, for the kind of tokenizer that there is."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import datasets
from transformers import PreTrainedTokenizerBase

from recyclable.data.growing import merges, runs, unigram
from recyclable.data.growing.growth import Growth
from recyclable.data.growing.sentence_piece import is_bpe
from recyclable.data.growing.words import Words, backend_of, count
from recyclable.errors import InputError

SETTING = "extend_vocabulary"
_MODELS = ("BPE", "WordPiece", "Unigram")


def require_grows(folder: Path, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What tokenizer.json calls the tokenizer's `model`; InputError for a kind that nothing can be learned for."""
    backend = backend_of(tokenizer)
    found = {} if backend is None else json.loads(backend.to_str())["model"]
    if found.get("type") not in _MODELS:
        is_ = f"is of the kind {found['type']}" if found else f"({type(tokenizer).__name__}) has no tokenizer.json"
        raise InputError(SETTING, f"the tokenizer of {folder} {is_}: expected one of {', '.join(_MODELS)}")
    if found.get("continuing_subword_prefix") and found["type"] == "BPE":
        problem = f"marks pieces within a word ({found['continuing_subword_prefix']!r}), as no known BPE does"
        raise InputError(SETTING, f"the tokenizer of {folder} {problem}")
    return found


def learn(
    corpus: datasets.Dataset,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    number: int,
    named: Collection[int] = (),
    quiet: bool = True,
) -> Growth:
    """`number` new pieces for a tokenizer, from a corpus; the same again from the same text, tokenizer and number.

    Args:
        corpus: as `words.count` has it.
        folder: the tokenizer's own.
        named: ids that stay free though no piece has them: the model's config names them.

    Raises InputError where the kind of tokenizer is not known, or the corpus has not so many.
    """
    model = require_grows(folder, tokenizer)
    words = count(corpus, tokenizer, quiet=quiet)
    known = tokenizer.get_vocab()
    pieces, parts, ranked, scores = _found(model, words, known, tokenizer, number, is_bpe(folder))
    if len(pieces) < number:
        problem = f"is {number}, but the corpus ({words.characters} characters read) gives {len(pieces)} new pieces"
        raise InputError(SETTING, f"{problem}: expected fewer, or more text")
    return Growth(
        model["type"],
        1 + max([*known.values(), *named]),
        tuple(pieces),
        tuple(parts),
        tuple(ranked),
        tuple(scores),
        words.documents,
        words.characters,
        words.of,
    )


def _found(
    model: dict[str, Any],
    words: Words,
    known: dict[str, int],
    tokenizer: PreTrainedTokenizerBase,
    number: int,
    by_text: bool,
) -> tuple[list[str], list[tuple[int, ...]], list[tuple[str, str]], list[float]]:
    """New pieces, of each the old ones it is made of, and what the kind of model has beside them."""
    spelled = {row: piece for piece, row in known.items()}
    if model["type"] == "BPE":
        own = {row: piece for piece, row in model["vocab"].items()}
        grown = merges.continued(words.counts, own, number, by_text, known)
        ranked = merges.splits(grown.pieces, own.values()) if by_text else grown.merges
        return grown.pieces, grown.parts, ranked, []
    if model["type"] == "WordPiece":
        inside = model["continuing_subword_prefix"]
        made = runs.saving(words.counts, spelled, number, inside, known)
        return list(made), list(made.values()), [], []
    backend = backend_of(tokenizer)
    assert backend is not None, "required before"
    learned = unigram.learned(words.counts, spelled, number, known)
    least = min((score for piece, score in model["vocab"]), default=0.0)  # the score of an unknown one hangs on it
    split = [tuple(token.id for token in backend.model.tokenize(piece)) for piece in learned]
    return list(learned), split, [], [max(score, least) for score in learned.values()]
