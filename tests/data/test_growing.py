"""New pieces of every kind of tokenizer: old texts keep their ids, all files agree; oracles recount it all."""

from __future__ import annotations

import random
from collections import Counter
from itertools import pairwise
from pathlib import Path

import datasets
import pytest
import sentencepiece
from piece_tokenizers import KINDS, NEW, OLD, bpe_file, save, word_pieces
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, LlamaConfig, PretrainedConfig

from recyclable.data.growing import merges, runs, sentence_piece, unigram
from recyclable.data.growing.growth import FILE, Growth
from recyclable.data.growing.learning import learn
from recyclable.data.growing.words import count
from recyclable.data.growing.writing import write_grown
from recyclable.errors import InputError
from recyclable.weights.vocabulary import load_tokenizer

NUMBER = 25


class Grown:
    """A tokenizer before and after."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.source, self.into = folder / "old", folder / "new"
        KINDS[kind](self.source)
        self.old = load_tokenizer(self.source)
        self.growth = learn(corpus(NEW), self.source, self.old, NUMBER)
        self.config = type(load_config(self.source))(vocab_size=self.growth.rows.stop)
        self.into.mkdir()
        self.left_out = write_grown(self.source, self.old, self.growth, self.config, self.into)
        self.new = load_tokenizer(self.into, self.config)


def load_config(folder: Path) -> PretrainedConfig:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder)


def corpus(documents: list[str]) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"text": documents})


@pytest.fixture(scope="module", params=KINDS)
def grown(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Grown:
    return Grown(tmp_path_factory.mktemp("grown"), request.param)


def ids(tokenizer: object, documents: list[str]) -> list[list[int]]:
    return tokenizer(documents, add_special_tokens=False)["input_ids"]


def test_old_pieces_keep_their_ids_and_new_ones_come_behind(grown: Grown) -> None:
    before, after = grown.old.get_vocab(), grown.new.get_vocab()
    assert {piece: after[piece] for piece in before} == before and len(after) == len(before) + NUMBER
    assert [after[piece] for piece in grown.growth.pieces] == list(range(len(before), len(before) + NUMBER))
    assert grown.new.all_special_ids == grown.old.all_special_ids


def test_texts_without_new_pieces_are_split_as_before(grown: Grown) -> None:
    several = [word for text in [*OLD, *NEW] for word in text.split()] + OLD
    changed = 0
    for text, before, after in zip(several, ids(grown.old, several), ids(grown.new, several), strict=True):
        if max(after) < grown.growth.first:
            assert after == before, text
        changed += after != before
        assert grown.new.decode(after) == grown.old.decode(before)
    assert 0 < changed < len(several)


def test_texts_of_the_corpus_have_fewer_tokens_and_every_piece_says_what_it_is_made_of(grown: Grown) -> None:
    before, after = (sum(map(len, ids(tokenizer, NEW))) for tokenizer in (grown.old, grown.new))
    assert after < 0.85 * before
    for piece, parts in zip(grown.growth.pieces, grown.growth.parts, strict=True):
        spelled = grown.old.convert_ids_to_tokens(list(parts))
        assert piece == spelled[0] + "".join(part.removeprefix("##") for part in spelled[1:])
        assert len(parts) > 1 and not any(char.isdigit() for char in piece if "é" not in piece)


def test_the_same_text_gives_the_same_pieces_and_a_record_brings_them_back(grown: Grown, tmp_path: Path) -> None:
    assert learn(corpus(NEW), grown.source, load_tokenizer(grown.source), NUMBER) == grown.growth
    again = tmp_path / "again"
    again.mkdir()
    write_grown(grown.source, load_tokenizer(grown.source), grown.growth, grown.config, again)
    assert all((again / path.name).read_bytes() == path.read_bytes() for path in grown.into.iterdir())
    assert Growth.recorded(tmp_path) is None
    grown.growth.write(tmp_path)
    assert Growth.recorded(tmp_path) == grown.growth
    (tmp_path / FILE).write_text('{"format": 1, "pieces": ["a"]}')
    with pytest.raises(InputError, match="is broken"):
        Growth.recorded(tmp_path)


def test_files_of_other_formats_have_the_pieces_too(grown: Grown) -> None:
    assert grown.left_out == {}
    found = {path.name for path in grown.into.iterdir()}
    pieces, first = list(grown.growth.pieces), grown.growth.first
    if "vocab.txt" in found:
        assert (grown.into / "vocab.txt").read_text().splitlines()[first:] == pieces
    if "vocab.json" in found:
        slow = Tokenizer(models.BPE.from_file(str(grown.into / "vocab.json"), str(grown.into / "merges.txt")))
        slow.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        assert [each.ids for each in slow.encode_batch(NEW)] == ids(grown.new, NEW)
    if "tokenizer.model" in found:
        model = sentencepiece.SentencePieceProcessor(model_file=str(grown.into / "tokenizer.model"))
        assert model.encode([*OLD, *NEW]) == ids(grown.new, [*OLD, *NEW])


def test_a_sentencepiece_file_whose_ids_are_others_is_left_out(tmp_path: Path) -> None:
    bpe_file(tmp_path / "old")
    old = load_tokenizer(tmp_path / "old")
    old.add_tokens(["<sentinel>"])
    old.save_pretrained(tmp_path / "old")
    config = LlamaConfig(vocab_size=500)
    config.save_pretrained(tmp_path / "old")
    growth = learn(corpus(NEW), tmp_path / "old", old, 5)
    (tmp_path / "new").mkdir()
    left_out = write_grown(tmp_path / "old", old, growth, config, tmp_path / "new")
    assert growth.first == 451 and list(left_out) == ["tokenizer.model"] and "at 451" in left_out["tokenizer.model"]
    assert not (tmp_path / "new" / "tokenizer.model").exists() and sentence_piece.files(tmp_path / "old")


def test_a_long_corpus_is_read_in_part_and_says_so(tmp_path: Path) -> None:
    word_pieces(tmp_path)
    most = sum(map(len, NEW)) // 3
    read = count(corpus(NEW), load_tokenizer(tmp_path), most=most)
    assert read.characters < most * 1.1 and read.of == sum(map(len, NEW)) and 45 <= read.documents <= 50


def test_other_kinds_and_corpora_without_so_many_pieces_are_refused(tmp_path: Path) -> None:
    made = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    save(made, tmp_path / "words", BertConfig(), "PreTrainedTokenizerFast", unk_token="[UNK]")
    with pytest.raises(InputError, match="is of the kind WordLevel: expected one of BPE, WordPiece, Unigram"):
        learn(corpus(NEW), tmp_path / "words", load_tokenizer(tmp_path / "words"), 3)
    word_pieces(tmp_path / "pieces")
    with pytest.raises(InputError, match="expected fewer, or more text"):
        learn(corpus(NEW[:1]), tmp_path / "pieces", load_tokenizer(tmp_path / "pieces"), 5000)


PIECES = {row: chr(ord("a") + row) for row in range(8)}


def random_words(seed: int) -> dict[tuple[int, ...], int]:
    draw = random.Random(seed)
    return dict(Counter(tuple(draw.choices(range(8), k=draw.randint(1, 6))) for _ in range(400)))


@pytest.mark.parametrize("seed", range(3))
def test_merges_are_those_of_counting_all_pairs_anew_each_time(seed: int) -> None:
    words, spelled = random_words(seed), dict(PIECES)
    wanted: list[tuple[str, str]] = []
    while len(spelled) < 8 + 30:
        counts: Counter[tuple[int, int]] = Counter()
        for word, times in words.items():
            for pair in pairwise(word):
                counts[pair] += times
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        text = spelled[best[0]] + spelled[best[1]]
        known = [row for row, piece in spelled.items() if piece == text]
        row = known[0] if known else len(spelled)
        spelled[row] = text
        wanted.append((spelled[best[0]], spelled[best[1]]))
        changed: Counter[tuple[int, ...]] = Counter()
        for word, times in words.items():
            merged: list[int] = []
            for token in word:
                both = merged and (merged[-1], token) == best
                merged[-1 if both else len(merged) :] = [row if both else token]
            changed[tuple(merged)] += times
        words = dict(changed)
    assert merges.continued(random_words(seed), PIECES, 30, False, ()).merges[: len(wanted)] == wanted


@pytest.mark.parametrize("seed", range(3))
def test_runs_are_those_that_save_most_when_all_is_counted_anew_each_time(seed: int) -> None:
    words = [([(token,) for token in word], times) for word, times in random_words(seed).items()]
    wanted: list[str] = []
    while len(wanted) < 20:
        saved: Counter[tuple[int, ...]] = Counter()
        for word, times in words:
            for start in range(len(word)):
                for stop in range(start + 2, len(word) + 1):
                    saved[sum(word[start:stop], ())] += times * (stop - start - 1)
        best = min(saved, key=lambda run: (-saved[run], run))
        wanted.append("".join(PIECES[token] for token in best))
        words = [(joined(word, best), times) for word, times in words]
    found = runs.saving(random_words(seed), PIECES, 20, "##", ())
    assert list(found) == wanted


def joined(word: list[tuple[int, ...]], run: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The word with every such run as one piece, from the left."""
    for start in range(len(word)):
        for stop in range(start + 2, len(word) + 1):
            if sum(word[start:stop], ()) == run:
                return [*word[:start], run, *joined(word[stop:], run)]
    return word


def test_a_piece_that_would_make_an_old_one_in_a_new_way_is_left_out_where_text_decides() -> None:
    pieces = {0: "a", 1: "b", 2: "c", 3: "bc", 4: "abc"}
    words = {(0, 1): 50, (1, 0): 10}
    assert merges.continued(words, pieces, 2, False, ()).pieces == ["ab", "ba"]
    assert merges.continued(words, pieces, 2, True, ()).pieces == ["ba"]


def test_unigram_pieces_come_from_texts_of_more_characters_than_pieces_and_from_words_that_tables_cannot_hold():
    letters = [chr(0x4E00 + n) for n in range(3000)]
    pieces = dict(enumerate(letters))
    words = {(n, (n + 1) % 3000): 2 for n in range(3000)} | {(1, 2, 3): 50}
    (found,) = unigram.learned(words, pieces, 1, set(letters))
    assert len(found) > 1 and found in "".join(letters[:5])
    assert unigram.learned({}, pieces, 5, set(letters)) == {}
    assert unigram.learned({(0, 1): 9}, {0: "a\t", 1: "b"}, 5, {"a"}) == {}
