"""The text of `recyclable pretrain`: what is trained on, what is held out, and old text beside the new."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from recyclable import distributed
from recyclable.config.settings import CorpusSettings
from recyclable.data.bad_rows import BadRows
from recyclable.data.corpus import find_corpus, pack
from recyclable.data.examples import Examples
from recyclable.data.order import Order, Replaying, Steps
from recyclable.data.packing import Joined, Packed, cache_root
from recyclable.disks import keeper
from recyclable.errors import InputError
from recyclable.lm.parts.kind import LMKind
from recyclable.weights.base import Base

HELDOUT_SHARE = 0.02
"""Of the sequences, where no text to hold out is named: the last ones."""
NEW, OLD = "", "replay_"
"""How scores of the new text and of the old begin."""


@dataclass(frozen=True)
class Text:
    """A run's examples."""

    training: Examples
    order: Steps
    """Which of them make up which step."""
    heldout: dict[str, Examples]
    """`NEW`, and `OLD` where old text is replayed -> what the loss is measured on."""
    digests: dict[str, str]
    """The same -> the digest of the tokens trained on."""
    left_out: dict[str, dict[str, Any]]
    """The same -> the bad rows that are left out (`data.bad_rows.BadRows.as_dict`)."""
    reads: dict[str, str]
    """Every text that the run reads, by the name of its setting -> the digest of its tokens."""


@dataclass(frozen=True)
class _Corpus:
    """One corpus, packed."""

    name: str
    training: Packed
    heldout: Packed
    cut: int
    """How many of the training sequences are trained on."""
    measured: range
    """Which of the held-out ones the loss is measured on."""
    bad: BadRows
    """What is left out of both."""

    def reads(self) -> dict[str, str]:
        """Its texts, by the name of their setting -> digest."""
        return {self.name: self.training.digest, f"{self.name}.heldout": self.heldout.digest}


def read_text(kind: LMKind, base: Base, tokenizer: PreTrainedTokenizerBase) -> Text:
    """The corpora of a run, packed as its kind packs them; a collective. Raises InputError."""
    new = _packed(kind, kind.corpus, "corpus", tokenizer)
    old = None if kind.replay is None else _packed(kind, kind.replay.corpus, "replay.corpus", tokenizer)
    if new.cut < distributed.world_size():
        raise InputError("corpus", f"{new.cut} sequences for {distributed.world_size()} ranks")

    def heldout(corpus: _Corpus) -> Examples:
        return kind.examples(corpus.heldout, tokenizer, base, corpus.measured)

    order: Steps = Order(new.cut, kind.train_batch_size, kind.seed)
    if old is None or kind.replay is None:
        training = kind.examples(new.training, tokenizer, base, range(new.cut))
        digests, left_out = {NEW: new.training.digest}, {NEW: new.bad.as_dict()}
        return Text(training, order, {NEW: heldout(new)}, digests, left_out, new.reads())
    joined, begin = Joined(new.training, old.training), len(new.training)
    places = np.concatenate([np.arange(new.cut), np.arange(begin, begin + old.cut)]).tolist()
    training = kind.examples(joined, tokenizer, base, places)
    order = Replaying(new.cut, old.cut, kind.replay.share, kind.train_batch_size, kind.seed)
    digests = {NEW: new.training.digest, OLD: old.training.digest}
    left_out = {NEW: new.bad.as_dict(), OLD: old.bad.as_dict()}
    return Text(training, order, {NEW: heldout(new), OLD: heldout(old)}, digests, left_out, new.reads() | old.reads())


def _packed(kind: LMKind, corpus: CorpusSettings, where: str, tokenizer: PreTrainedTokenizerBase) -> _Corpus:
    quiet = not (distributed.is_main() and sys.stderr.isatty())
    layout, bad = kind.layout(tokenizer), BadRows(corpus.bad_rows)

    def packed(source: str | list[str], name: str, split: str) -> Packed:
        text = find_corpus(source, text_column=corpus.text_column, split=split, quiet=quiet, bad=bad)
        return pack(text, tokenizer, kind.max_length, layout, quiet=quiet, where=name, verified=not leads)

    with distributed.main_first(keeper(cache_root())) as leads:
        blocks = heldout = packed(corpus.train, where, "train")
        if corpus.heldout is not None:
            heldout = packed(corpus.heldout, f"{where}.heldout", "heldout")
    if bad.counts:
        distributed.say(f"notice: {where}: {bad}")
    cut, first = len(blocks), 0
    if corpus.heldout is None:
        cut = first = len(blocks) - max(1, round(len(blocks) * HELDOUT_SHARE))
        if cut == 0:
            raise InputError(where, "only one sequence, expected another to hold out; or name `heldout`")
    last = min(len(heldout), first + (kind.max_heldout_sequences or len(heldout)))
    return _Corpus(where, blocks, heldout, cut, range(first, last), bad)
