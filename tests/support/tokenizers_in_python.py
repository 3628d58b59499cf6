"""Bases whose tokenizers are made of files that only their classes know, two of them in Python."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import (
    BartphoTokenizer,
    LukeConfig,
    LukeForMaskedLM,
    MBartConfig,
    MBartForConditionalGeneration,
    PhobertTokenizer,
    RobertaConfig,
    RobertaForMaskedLM,
)


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


def make_bartpho(folder: Path) -> Path:
    """A small BARTpho: a BART with sentence pieces, of which dict.txt names those that it has; returns `folder`."""
    import sentencepiece

    folder.mkdir()
    text = iter(["the thing an aner ring in the other thin air", "an inner ring"] * 50)
    model = str(folder / "sentencepiece.bpe")
    quiet = {"minloglevel": 3, "hard_vocab_limit": False}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=text, model_prefix=model, vocab_size=40, **quiet)
    names = [line.split("\t")[0] for line in (folder / "sentencepiece.bpe.vocab").read_text().splitlines()]
    (folder / "sentencepiece.bpe.vocab").unlink()
    (folder / "dict.txt").write_text("".join(f"{name} 1\n" for name in names[3::2]))
    tokenizer = BartphoTokenizer(f"{model}.model", str(folder / "dict.txt"))
    tokenizer.save_pretrained(folder)
    size = {f"{part}_{what}": n for part in ("encoder", "decoder") for what, n in (("layers", 1), ("ffn_dim", 8))}
    size |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "d_model": 8, "max_position_embeddings": 64}
    MBartForConditionalGeneration(MBartConfig(vocab_size=len(tokenizer), **size)).save_pretrained(folder)
    return folder


def make_luke(folder: Path) -> Path:
    """A small LUKE: words and entities, each with a vocabulary of its own, as on the hub; returns `folder`."""
    folder.mkdir()
    pieces = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *(chr(code) for code in range(97, 123)), "Ġ", "th", "the"]
    pieces += ["<ent>", "<ent2>"]
    spare = 8  # rows for what its class adds
    (folder / "vocab.json").write_text(json.dumps({piece: row for row, piece in enumerate(pieces)}))
    (folder / "merges.txt").write_text("#version: 0.2\nt h\nth e\n")
    entities = ["[PAD]", "[UNK]", "[MASK]", "[MASK2]", "Ann"]
    (folder / "entity_vocab.json").write_text(json.dumps({name: row for row, name in enumerate(entities)}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LukeTokenizer"}))
    size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    config = LukeConfig(vocab_size=len(pieces) + spare, entity_vocab_size=5, entity_emb_size=4, **size)
    LukeForMaskedLM(config).save_pretrained(folder)
    return folder
