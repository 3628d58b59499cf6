"""What a vocabulary grows by: pieces, ids, the old pieces they are made of; a record that a run resumes from."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from recyclable.errors import InputError
from recyclable.weights.durable import write_json
from recyclable.weights.strict_json import read_json

FILE = "extended_vocabulary.json"
FORMAT = 1


@dataclass(frozen=True)
class Growth:
    """New pieces of a tokenizer, in the order of their ids."""

    model: str
    """What tokenizer.json calls the kind of its model: BPE, WordPiece or Unigram."""
    first: int
    """The id of the first new piece: the first that neither tokenizer nor config has a use for."""
    pieces: tuple[str, ...]
    parts: tuple[tuple[int, ...], ...]
    """Of each, the ids of the old pieces that it is made of."""
    merges: tuple[tuple[str, str], ...] = ()
    """BPE's pairs that make them, behind all old ones."""
    scores: tuple[float, ...] = ()
    """Unigram's log-probabilities."""
    documents: int = 0
    """How many documents they were learned from."""
    characters: int = 0
    of: int = 0
    """Characters of the whole corpus."""

    @property
    def rows(self) -> range:
        """The ids of the new pieces."""
        return range(self.first, self.first + len(self.pieces))

    def write(self, folder: Path) -> None:
        """Leave a record of it."""
        write_json(folder / FILE, {"format": FORMAT, **asdict(self)})

    @classmethod
    def recorded(cls, folder: Path) -> Growth | None:
        """What a run has recorded there; None where none has. Raises InputError for a broken record."""
        if not (folder / FILE).is_file():
            return None
        record = read_json(folder / FILE)
        try:
            if record.pop("format") != FORMAT:
                raise ValueError(f"expected format {FORMAT}")
            return cls(**{name: _frozen(value) for name, value in record.items()})
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(folder / FILE, f"is broken ({error}), expected the run's new pieces") from error


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value
