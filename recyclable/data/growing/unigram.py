"""New pieces of a unigram language model, learned by the `sentencepiece` library (Kudo 2018, arXiv 1804.10959).

Splitting takes the most probable of all ways: where none of the new pieces is in it, it is the old one.
"""

from __future__ import annotations

import io
import math
import re
import tempfile
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path

import sentencepiece

from recyclable.data.growing.words import LONGEST

_ROUNDS = 5
_BREAKS = re.compile("[\0\t\n\r]")  # what the library's tables cannot hold within a word


def learned(
    words: Mapping[tuple[int, ...], int], pieces: Mapping[int, str], number: int, known: Collection[str]
) -> dict[str, float]:
    """At most `number` pieces that are not `known` -> their log-probabilities, the likeliest first.

    A model of its own is trained on the words, normalised as the tokenizer does it, with a vocabulary large enough
    that so many of its pieces are new.

    Args:
        words: ids of a word's pieces -> how often it came.
        pieces: id -> text of the old pieces.
    """
    counts: Counter[str] = Counter()
    for word, times in words.items():
        counts["".join(pieces[row] for row in word)] += times
    counts = Counter({word: times for word, times in counts.items() if not _BREAKS.search(word)})
    if not counts:
        return {}
    characters = len(set().union(*counts))  # each is a piece, and so are the library's own three
    size, found = 1000 + characters + 4 * number, dict[str, float]()
    for _ in range(_ROUNDS):
        trained = _trained(counts, size)
        found = {piece: score for piece, score in trained.items() if piece not in known and len(piece) > 1}
        if len(found) >= number or len(trained) < size - 10:  # there are no more to be had
            break
        size *= 2
    best = sorted(found.items(), key=lambda item: (-item[1], item[0]))[:number]
    return dict(best)


def _trained(counts: Mapping[str, int], size: int) -> dict[str, float]:
    """Piece -> log-probability, of a unigram model of this size trained on these words."""
    total = sum(counts.values())
    scale = min(1.0, 2**31 / total) if total else 1.0  # the library counts in 32 bits
    model = io.BytesIO()
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / "words.tsv"
        lines = (f"{word}\t{max(1, math.floor(times * scale))}\n" for word, times in sorted(counts.items()))
        table.write_text("".join(lines), encoding="utf-8")
        sentencepiece.SentencePieceTrainer.train(
            input=str(table),
            input_format="tsv",
            model_writer=model,
            model_type="unigram",
            vocab_size=size,
            hard_vocab_limit=False,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            character_coverage=1.0,
            max_sentencepiece_length=LONGEST,
            num_threads=1,  # the sums' order, and so the result, depends on it
            minloglevel=2,
        )
    read = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    rows = (row for row in range(read.get_piece_size()) if not (read.is_control(row) or read.is_unknown(row)))
    return {read.id_to_piece(row): read.get_score(row) for row in rows}
