"""Tokenizers of every kind that learns new pieces, trained on an invented language, and texts with new words."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import sentencepiece
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, BertConfig, GPT2Config, LlamaConfig, PretrainedConfig, T5Config

SYLLABLES = [first + second for first in "bdfgklmnprstv" for second in "aeiou"]


def words(seed: int, number: int) -> list[str]:
    draw = random.Random(seed)
    return ["".join(draw.choices(SYLLABLES, k=draw.randint(1, 5))) for _ in range(number)]


def texts(vocabulary: list[str], documents: int, seed: int) -> list[str]:
    """Some words come far more often than others; digits, signs and a letter nobody has seen."""
    draw, weights = random.Random(seed), [1 / place for place in range(1, len(vocabulary) + 1)]
    several, weights = [*vocabulary, "12", "é,", "(a)"], [*weights, 0.2, 0.1, 0.1]
    return [" ".join(draw.choices(several, weights, k=30)) for _ in range(documents)]


OLD, NEW = texts(words(0, 60), 120, 1), texts(words(5, 80), 150, 2)


def save(tokenizer: Tokenizer, folder: Path, config: PretrainedConfig, named: str, **special: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config.vocab_size = tokenizer.get_vocab_size()
    config.save_pretrained(folder)
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": named, **special}))


def byte_level(folder: Path) -> None:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    made.train_from_iterator(OLD, trainer)
    save(made, folder, GPT2Config(), "GPT2Tokenizer", eos_token="<|endoftext|>", unk_token="<|endoftext|>")
    made.model.save(str(folder))  # vocab.json and merges.txt as well


def word_pieces(folder: Path) -> None:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    made.train_from_iterator(OLD, trainers.WordPieceTrainer(vocab_size=150, special_tokens=special))
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), special, strict=True))
    save(made, folder, BertConfig(), "BertTokenizer", **names)
    made.model.save(str(folder))  # vocab.txt as well


def unigram(folder: Path) -> None:
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    made.train_from_iterator(OLD, trainers.UnigramTrainer(vocab_size=150, special_tokens=special, unk_token="<unk>"))
    save(made, folder, T5Config(), "PreTrainedTokenizerFast", eos_token="</s>", unk_token="<unk>", pad_token="<pad>")


def bpe_file(folder: Path) -> None:
    """A file of SentencePiece's BPE, as Llama's and Mistral's, beside its conversion."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "old.txt").write_text("\n".join(OLD))
    with (folder / "tokenizer.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            input=str(folder / "old.txt"),
            model_writer=file,
            model_type="bpe",
            vocab_size=450,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            minloglevel=2,
        )
    (folder / "old.txt").unlink()
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    LlamaConfig(vocab_size=450).save_pretrained(folder)
    AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
    assert {"tokenizer.json", "tokenizer.model"} <= {path.name for path in folder.iterdir()}


KINDS: dict[str, Callable[[Path], None]] = {
    "byte-level BPE": byte_level,
    "WordPiece": word_pieces,
    "Unigram": unigram,
    "SentencePiece BPE": bpe_file,
}
