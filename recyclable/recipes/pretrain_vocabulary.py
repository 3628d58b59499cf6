"""Where `recyclable pretrain` starts: its base, with the pieces that its vocabulary is to grow by where it does."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from recyclable import distributed
from recyclable.data.bad_rows import BadRows
from recyclable.data.corpus import load_corpus
from recyclable.data.growing.growth import Growth
from recyclable.data.growing.learning import learn, require_grows
from recyclable.data.growing.writing import write_grown
from recyclable.data.tokenising import tokenised
from recyclable.lm.parts.kind import LMKind
from recyclable.recipes.pretrain_text import HELDOUT_SHARE
from recyclable.weights.base import Base
from recyclable.weights.grown import GrownBase
from recyclable.weights.vocabulary import load_tokenizer

_TEXTS = 1000
_NAMED = "_token_id"


@dataclass(frozen=True)
class Start:
    """A base and its tokenizer as the run starts from them."""

    base: Base
    tokenizer: PreTrainedTokenizerBase
    tokenizer_folder: Path
    growth: Growth | None = None
    told: dict[str, Any] = field(default_factory=dict)
    """What the lineage says of it."""

    def record(self, out: Path) -> None:
        """Leave the new pieces in the run's directory, for a run that is resumed; a collective."""
        if (growth := self.growth) is not None:
            distributed.main_writes(lambda: growth.write(out))


@contextmanager
def starting(kind: LMKind, parent: Base, tokenizer: PreTrainedTokenizerBase, resume: bool) -> Iterator[Start]:
    """The parent, with more pieces and rows where `extend_vocabulary` asks for them; a collective.

    Rank 0 learns the pieces, or reads what a run that is resumed has learned; every rank writes the tokenizer to a
    directory of its own, which is gone at the end.

    Raises InputError where the tokenizer is of no kind that grows, or the corpus has not so many pieces.
    """
    if kind.extend_vocabulary is None:
        yield Start(parent, tokenizer, parent.folder)
        return
    require_grows(parent.folder, tokenizer)
    growth = None
    with distributed.main_first():
        if distributed.is_main():
            growth = (Growth.recorded(kind.out) if resume else None) or _learned(kind, parent, tokenizer)
    growth = distributed.broadcast_object(growth)
    assert growth is not None, "rank 0 has learned it"
    base = GrownBase(parent, growth.first, growth.parts)
    with tempfile.TemporaryDirectory() as folder:
        left_out = write_grown(parent.folder, tokenizer, growth, base.config, Path(folder))
        grown = load_tokenizer(Path(folder), base.config)
        kind.require(base, grown)
        told = _told(kind, growth, parent, base, (tokenizer, grown), left_out)
        yield Start(base, grown, Path(folder), growth, {"extend_vocabulary": told})


def _learned(kind: LMKind, parent: Base, tokenizer: PreTrainedTokenizerBase) -> Growth:
    assert kind.extend_vocabulary is not None
    quiet = not sys.stderr.isatty()
    told = kind.corpus
    corpus = load_corpus(told.train, text_column=told.text_column, quiet=quiet, bad=BadRows(told.bad_rows))
    if kind.corpus.heldout is None:
        corpus = corpus.select(range(_first_left_out(len(corpus))))
    return learn(corpus, parent.folder, tokenizer, kind.extend_vocabulary, _named(parent), quiet)


def _named(base: Base) -> list[int]:
    """Rows of the embeddings that the config has a use for, whether the tokenizer has a piece for them or not."""
    named = [value for name, value in base.config.to_dict().items() if name.endswith(_NAMED)]
    values = [row for value in named for row in (value if isinstance(value, list) else [value])]
    return [row for row in values if type(row) is int and 0 <= row < base.config.vocab_size]


def _told(
    kind: LMKind,
    growth: Growth,
    parent: Base,
    base: Base,
    tokenizers: tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase],
    left_out: dict[str, str],
) -> dict[str, Any]:
    """What the lineage says of the new pieces, and a line for people; a collective."""
    per_text = None
    with distributed.main_first():
        if distributed.is_main():
            texts, held_out = _texts(kind)
            before, after = (_tokens(each, texts) / len(texts) for each in tokenizers)
            per_text = {"before": before, "after": after, "texts": len(texts), "held_out": held_out}
    per_text = distributed.broadcast_object(per_text)
    assert per_text is not None
    read = f"{growth.characters:,} of the corpus's {growth.of:,} characters"
    change = f"{per_text['before']:.1f} -> {per_text['after']:.1f} tokens per text"
    distributed.say(f"{len(growth.pieces)} new pieces from {read}: {change}")
    for name, why in left_out.items():
        distributed.say(f"notice: {name} of {parent.folder} is left out: {why}")
    return {
        "asked": kind.extend_vocabulary,
        "learned": len(growth.pieces),
        "first": growth.first,
        "rows": {"before": parent.config.vocab_size, "after": base.config.vocab_size},
        "documents": growth.documents,
        "characters": growth.characters,
        "corpus_characters": growth.of,
        "tokens_per_text": per_text,
        "left_out": left_out,
    }


def _texts(kind: LMKind) -> tuple[list[str], bool]:
    """Some texts that are held out, else the last of the corpus; and whether they are held out by a setting."""
    corpus = kind.corpus
    source, split = (corpus.train, "train") if corpus.heldout is None else (corpus.heldout, "heldout")
    found = load_corpus(source, text_column=corpus.text_column, split=split, bad=BadRows(corpus.bad_rows))
    first = 0 if corpus.heldout is not None else _first_left_out(len(found))
    places = range(first, len(found), max(1, (len(found) - first) // _TEXTS))[:_TEXTS]
    return list(found.select(places)["text"]), corpus.heldout is not None


def _first_left_out(documents: int) -> int:
    """Where the documents begin that nothing is learned from, as what is made of them is about what is held out."""
    return documents - max(1, round(documents * HELDOUT_SHARE))


def _tokens(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> int:
    return sum(len(piece.ids) for piece in tokenised(tokenizer, texts))
