"""A base whose tokenizer is in Python, made of files that only its class knows."""

from __future__ import annotations

from pathlib import Path

from transformers import PhobertTokenizer, RobertaConfig, RobertaForMaskedLM


def make_phobert(folder: Path) -> Path:
    """A small PhoBERT: a RoBERTa with a vocabulary of word pieces and the merges that make them; returns `folder`."""
    folder.mkdir()
    letters = [chr(code) for code in range(97, 123)]
    pieces = [*letters, *(f"{letter}@@" for letter in letters), "th@@", "the", "an", "an@@", "er", "in@@", "ing"]
    (folder / "vocab.txt").write_text("".join(f"{piece} 1\n" for piece in pieces))
    merges = ("t h 10", "th e</w> 9", "a n</w> 8", "a n 7", "e r</w> 6", "i n 5", "in g</w> 4")
    (folder / "bpe.codes").write_text("".join(f"{merge}\n" for merge in merges))
    tokenizer = PhobertTokenizer(str(folder / "vocab.txt"), str(folder / "bpe.codes"))
    tokenizer.save_pretrained(folder)
    size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    RobertaForMaskedLM(RobertaConfig(vocab_size=len(tokenizer), **size)).save_pretrained(folder)
    return folder
