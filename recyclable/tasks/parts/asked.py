"""What a model is asked to answer: texts that it goes on from, or conversations; read from a file, and in tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from recyclable.data.files import format_of, read_rows
from recyclable.data.prompts import bare, prompt_tokens
from recyclable.errors import InputError
from recyclable.tasks.parts.cells import MESSAGES, TEXT
from recyclable.tasks.parts.chat import ASSISTANT, Message, prompt_text, require_template

_CELLS = {"prompt": TEXT, "messages": MESSAGES}


@dataclass(frozen=True)
class Prompt:
    """One row."""

    where: str
    """File and row, for messages to people."""
    column: str
    """`prompt` or `messages`."""
    asked: str | list[Message]

    def tokens(self, tokenizer: PreTrainedTokenizerBase, encoded: bool) -> list[int]:
        """What an answer is generated from, in tokens, as tasks of generation have it.

        Args:
            encoded: an encoder reads it, else a decoder goes on from it.

        Raises InputError for messages without a chat template, or that it cannot write.
        """
        if isinstance(self.asked, str):
            return tokenizer(self.asked)["input_ids"] if encoded else prompt_tokens(tokenizer, [self.asked])[0]
        require_template(tokenizer)
        return bare(tokenizer, [prompt_text(tokenizer, self.asked, self.where)])[0]


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts of a file: a line each (.txt), or rows with a column `prompt` or `messages` (`data.files.read_rows`).

    Raises InputError for a file without rows, and for a row that has neither column or both, or is empty.
    """
    if not path.is_file():
        raise InputError(path, "no such file, expected one of prompts: .txt (a line each), or rows (.jsonl, .csv ...)")
    is_text = (format_of(path) or "").startswith(".txt")
    rows = ((place, {"prompt": row["text"]} if is_text else row) for place, row in read_rows(path))
    return _checked(str(path), rows)


def given_prompts(prompts: Sequence[str | list[Message]]) -> list[Prompt]:
    """As `read_prompts`, of texts and conversations in memory."""
    return _checked("prompts", enumerate(({_column(one): one} for one in prompts), 1))


def _column(asked: object) -> str:
    return "prompt" if isinstance(asked, str) else "messages"


def _checked(where: str, rows: Iterable[tuple[int, dict[str, Any]]]) -> list[Prompt]:
    prompts = []
    for place, row in rows:
        at, found = f"{where}, row {place}", [name for name in _CELLS if row.get(name) is not None]
        if len(found) != 1:
            either = "both of" if found else "neither of"
            raise InputError(at, f"has {either} the columns `prompt` and `messages`, expected one; found {sorted(row)}")
        (column,) = found
        asked = _CELLS[column].read(where, place, column, row[column])
        if not asked:
            raise InputError(at, "is an empty prompt, expected a text to go on from")
        if column == "messages" and asked[-1]["role"] == ASSISTANT:
            raise InputError(at, "ends with a message of the assistant's, expected one that it is to answer")
        prompts.append(Prompt(at, column, asked))
    if not prompts:
        raise InputError(where, "holds no prompts, expected one at least")
    return prompts
