"""Prompts and what follows them, in tokens: a prompt's are those that an answer is generated from."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from recyclable.errors import InputError

_ANCHOR = "\n"


def bare(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Tokens of texts with nothing added before or behind; special tokens that a text spells are such tokens."""
    if not texts:
        return []
    return tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]  # verbose warns of long texts


def added(tokenizer: PreTrainedTokenizerBase, sample: str = "") -> tuple[list[int], list[int]]:
    """What a tokenizer puts before and behind the tokens of any text.

    Args:
        sample: a text to see it by, should "a" have no tokens.
    """
    for text in ("a", sample):
        within, whole = bare(tokenizer, [text])[0], tokenizer(text, verbose=False)["input_ids"]
        for start in range(len(whole) - len(within) + 1 if within else 0):
            if whole[start : start + len(within)] == within:
                return whole[:start], whole[start + len(within) :]
    return [], []


def prompt_tokens(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[list[int]]:
    """Tokens of each prompt as a decoder goes on from it: with what the tokenizer puts before a text (<s>), without
    what it puts behind one. Where there is nothing, an answer starts from the token that begins or else ends texts.

    Raises InputError for a prompt without tokens where the tokenizer has no such token.
    """
    before, _ = added(tokenizer, next(filter(None, prompts), ""))
    return [before + ids or _start(tokenizer) for ids in bare(tokenizer, prompts)]


def shortened(prompt: list[int], most: int, around: tuple[list[int], list[int]]) -> list[int]:
    """A prompt's last tokens, at least one and else `most`; what the tokenizer puts around any text stays.

    Args:
        around: as `added` tells, as far as the prompt has it.
    """
    before, behind = around
    if len(prompt) <= most or most <= len(before) + len(behind):
        return prompt[-max(1, most) :]
    return before + prompt[len(before) + len(prompt) - most :]


def continuations(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], responses: Sequence[str]
) -> list[list[int]]:
    """Tokens of each response behind its prompt.

    Both are joined as they stand and cut into tokens. Where the prompt's own tokens are the first of these, the others
    are the response's; where they are not, since a token would reach over the seam, the response is cut by itself.
    """
    joined = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
    found = []
    for before, whole, response in zip(bare(tokenizer, prompts), bare(tokenizer, joined), responses, strict=True):
        rest = whole[len(before) :] if whole[: len(before)] == before else []
        found.append(rest or inside(tokenizer, response))
    return found


def inside(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokens of a text by itself that stands inside of another one: where tokenizers put a blank before the first word
    (SentencePiece), none is put here."""
    anchor, anchored, alone = bare(tokenizer, [_ANCHOR, _ANCHOR + text, text])
    return anchored[len(anchor) :] if anchor and anchored[: len(anchor)] == anchor else alone


def _start(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return [token]
    problem = "makes no token of a prompt, and has none that begins or ends a text, which an answer could start from"
    raise InputError(tokenizer.name_or_path, problem)
