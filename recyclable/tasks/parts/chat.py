"""Conversations in tokens, by the tokenizer's own chat template: which of them are an assistant's.

Most templates mark no assistant's tokens, so they are found by comparing: what the template writes of the messages
before a turn, with the beginning of an answer, must be the first part of what it writes with the turn, and that of what
it writes of the whole conversation. A template that rewrites earlier turns is refused: what was learnt at such a turn
would be asked for at no other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from recyclable.data.prompts import bare, inside
from recyclable.errors import InputError

ASSISTANT = "assistant"
Message = dict[str, Any]


class Written(NamedTuple):
    """A conversation up to its last assistant turn."""

    ids: list[int]
    turns: list[tuple[int, int]]
    """Where each assistant turn begins in `ids`, and where it ends, in order; what follows it in the template too."""


def last_turn(messages: Sequence[Message]) -> int | None:
    """The place of the last message that is an assistant's."""
    return max((place for place, message in enumerate(messages) if message["role"] == ASSISTANT), default=None)


def require_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """InputError for a tokenizer without a chat template."""
    if not tokenizer.chat_template:
        problem = "its tokenizer has no chat template, which `messages` need: expected chat_template.jinja, or rows of"
        raise InputError(tokenizer.name_or_path, f"{problem} `prompt` and `response`")


def prompt_text(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], where: str) -> str:
    """What the template writes of messages, and how an answer to them begins; InputError where it cannot."""
    return _rendered(tokenizer, messages, where, answer=True)


def written(
    tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Sequence[Message]], places: Sequence[str]
) -> list[Written]:
    """Conversations, each with at least one assistant turn, which ends it.

    Args:
        places: where each comes from, for messages.

    Raises InputError for a template that cannot write one, or whose turns cannot be told apart.
    """
    require_template(tokenizer)
    parts = [_parts(tokenizer, one, place) for one, place in zip(conversations, places, strict=True)]
    tokens = iter(bare(tokenizer, [text for pairs in parts for pair in pairs for text in pair]))
    return [_in_tokens(tokenizer, pairs, [(next(tokens), next(tokens)) for _ in pairs]) for pairs in parts]


def _parts(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], place: str) -> list[tuple[str, str]]:
    """Of each assistant turn what is written before it and what is written with it, each part of the next."""
    found: list[tuple[str, str]] = []
    if messages[0]["role"] == ASSISTANT:
        raise InputError(place, "begins with the assistant's message, expected one before it that it answers")
    for turn in (at for at, message in enumerate(messages) if message["role"] == ASSISTANT):
        before = prompt_text(tokenizer, messages[:turn], place)
        within = _rendered(tokenizer, messages[: turn + 1], place, answer=False)
        if found and not before.startswith(found[-1][1]):
            problem = "the chat template writes earlier assistant turns otherwise once another message follows"
            raise InputError(place, f"{problem}: {_difference(found[-1][1], before)}; expected one turn per row")
        if not within.startswith(before):
            problem = f"the chat template does not begin message {turn + 1}, an assistant's, as it begins an answer"
            raise InputError(place, f"{problem}: {_difference(before, within)}")
        found.append((before, within))
    return found


def _in_tokens(
    tokenizer: PreTrainedTokenizerBase, texts: list[tuple[str, str]], tokens: list[tuple[list[int], list[int]]]
) -> Written:
    """The parts one behind the other; where a token would reach over a seam, the part behind it is cut by itself."""
    ids: list[int] = []
    turns, seam = [], 0
    for pair, cut in zip(texts, tokens, strict=True):
        for text, whole in zip(pair, cut, strict=True):
            ids = whole if whole[: len(ids)] == ids else [*ids, *inside(tokenizer, text[seam:])]
            turns.append(len(ids))
            seam = len(text)
    return Written(ids, list(zip(turns[::2], turns[1::2], strict=True)))


def _rendered(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], where: str, *, answer: bool) -> str:
    try:
        return tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=answer)
    except Exception as error:  # a template is a program of its own: whatever it stumbles over, and its own refusals
        said = str(error).strip() or type(error).__name__
        raise InputError(where, f"the chat template cannot write it: {' '.join(said.split())}") from error


def _difference(first: str, second: str) -> str:
    """Where two texts part."""
    at = next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second)))
    begin = max(0, at - 20)
    return f"{first[begin : at + 20]!r} became {second[begin : at + 20]!r}"
