"""The oracle of tests of tags per word: words aligned with their pieces by hand, entities by conlleval's rules."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise

import torch
from transformers import PreTrainedTokenizerBase


def first_pieces(tokenizer: PreTrainedTokenizerBase, words: Sequence[str], length: int) -> list[int]:
    """Where each word's first piece stands in [CLS] words [SEP], cut to `length`; 0 where it does not."""
    cut = [tokenizer.tokenize(word) for word in words]
    places = accumulate([1, *map(len, cut)])
    return [place if of and place < length - 1 else 0 for place, of in zip(places, cut, strict=False)]


def labels_per_piece(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """What transformers wants for a batch of `tasks.tokens` [B, L]: a word's tag on its first piece, -100 elsewhere."""
    labels = torch.full_like(batch["input_ids"], -100)
    for i, (tags, places) in enumerate(zip(batch["labels"].tolist(), batch["words.positions"].tolist(), strict=True)):
        for tag, place in zip(tags, places, strict=True):
            if place:
                labels[i, place] = tag
    return labels


def plain_batch(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[Sequence[str]], tags: Sequence[Sequence[int]], length: int
) -> dict[str, torch.Tensor]:
    """[CLS] words [SEP] of each text, cut to `length` and padded, with labels as transformers wants them."""
    ids = [[piece for word in words for piece in tokenizer.tokenize(word)][: length - 2] for words in texts]
    inputs = [[tokenizer.cls_token_id, *tokenizer.convert_tokens_to_ids(of), tokenizer.sep_token_id] for of in ids]
    width = max(map(len, inputs))
    batch = {
        "input_ids": torch.tensor([of + [tokenizer.pad_token_id] * (width - len(of)) for of in inputs]),
        "attention_mask": torch.tensor([[1] * len(of) + [0] * (width - len(of)) for of in inputs]),
        "labels": torch.full((len(inputs), width), -100),
    }
    for i, (words, of) in enumerate(zip(texts, tags, strict=True)):
        for place, tag in zip(first_pieces(tokenizer, words, length), of, strict=True):
            if place:
                batch["labels"][i, place] = tag
    return batch


def chunks(tags: Iterable[str]) -> set[tuple[int, int, str]]:
    """(begin, end, type) of each entity, by the rules of conlleval.pl with those for E and S of IOBES."""

    def parted(tag: str) -> tuple[str, str]:
        return tag[0].translate(str.maketrans("LU", "ES")), tag[2:]

    found, begin = set(), 0
    for place, ((before, its), (now, own)) in enumerate(pairwise(map(parted, ["O", *tags, "O"]))):
        ends = before in ("E", "S") or (before in ("B", "I") and (now in ("B", "S", "O") or its != own))
        starts = now in ("B", "S") or (now in ("I", "E") and (before in ("E", "S", "O") or its != own))
        if ends:
            found.add((begin, place, its))
        begin = place if starts else begin
    return found


def conlleval(wanted: Sequence[Iterable[str]], found: Sequence[Iterable[str]]) -> dict[str, float]:
    """precision, recall and f1 of the entities of all texts together."""
    true, told = ({(i, *each) for i, of in enumerate(side) for each in chunks(of)} for side in (wanted, found))
    precision, recall = len(true & told) / max(1, len(told)), len(true & told) / max(1, len(true))
    f1 = 2 * precision * recall / (precision + recall) if true & told else 0.0
    return {"precision": precision, "recall": recall, "f1": f1}
