"""Scores of generated answers against those that there should be: exact match, F1 of words, ROUGE-L."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

_ARTICLE = re.compile(r"\b(a|an|the)\b")
_WORD = re.compile(r"[^\W_]+")


def of_answers(found: Sequence[str], wanted: Sequence[str]) -> dict[str, float]:
    """exact_match, f1 and rouge_l, each a mean over answers.

    exact_match: the same text, blanks around it left out. f1: of words, as SQuAD counts them (Rajpurkar et al. 2016,
    arXiv 1606.05250): without case, punctuation and articles; 1 where neither has a word, 0 where one has none.
    rouge_l: F1 of the longest common subsequence of words (Lin 2004, aclanthology.org/W04-1013), without case and
    unstemmed, as rouge-score has it, but with letters and digits of all languages.

    Raises:
        ValueError: no answers, or not as many of both.
    """
    pairs = list(zip(found, wanted, strict=True))
    if not pairs:
        raise ValueError("no answers, expected at least one")
    return {
        "exact_match": sum(a.strip() == b.strip() for a, b in pairs) / len(pairs),
        "f1": sum(_f1(_squad_words(a), _squad_words(b)) for a, b in pairs) / len(pairs),
        "rouge_l": _rouge_l(found, wanted),
    }


def _squad_words(text: str) -> list[str]:
    plain = "".join(character for character in text.lower() if character not in string.punctuation)
    return _ARTICLE.sub(" ", plain).split()


def _f1(found: list[str], wanted: list[str]) -> float:
    if not found or not wanted:
        return float(found == wanted)
    return 2 * (Counter(found) & Counter(wanted)).total() / (len(found) + len(wanted))


def _rouge_l(found: Sequence[str], wanted: Sequence[str]) -> float:
    from torchmetrics.functional.text import rouge_score  # slow to import

    def words(text: str) -> list[str]:
        return _WORD.findall(text.lower())

    # its own normalizer would drop all letters but a to z
    scores = rouge_score(list(found), list(wanted), rouge_keys="rougeL", normalizer=str, tokenizer=words)
    return float(scores["rougeL_fmeasure"])
