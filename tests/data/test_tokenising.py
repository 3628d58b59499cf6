"""Long documents in windows: the tokens are those of the whole document, and no call is given more than a window."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from pathlib import Path

import datasets
import pytest
from piece_tokenizers import KINDS, NEW, OLD
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerBase

from recyclable.data import tokenising
from recyclable.data.corpus import pack
from recyclable.data.examples import LabelledTexts
from recyclable.data.split import Split
from recyclable.data.tokenising import Piece, between_blanks, tokenised

SIZES = {"WINDOW": 400, "OVERLAP": 240, "_AGREED": 4, "_TOGETHER": 900, "_DOCUMENTS": 3}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in SIZES.items():
        monkeypatch.setattr(tokenising, name, size)


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    folder = tmp_path_factory.mktemp("tokenizer") / "base"
    KINDS[request.param](folder)
    return AutoTokenizer.from_pretrained(folder)


def whole(tokenizer: PreTrainedTokenizerBase, document: str) -> list[int]:
    return tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]


def together(pieces: list[Piece]) -> list[list[int]]:
    """The tokens of each document, of the pieces that begin and end it."""
    documents: list[list[int]] = []
    for piece in pieces:
        documents += [[]] if piece.begins else []
        documents[-1].extend(piece.ids)
    assert sum(piece.begins for piece in pieces) == sum(piece.ends for piece in pieces) == len(documents)
    return documents


def documents(seed: int) -> list[str]:
    """Short ones, long ones, empty ones; lines, runs of blanks, signs and letters that nobody has seen."""
    draw = random.Random(seed)
    signs = ["… ", " 12.5 é e\u0301 ", " 漢字 ", " 👩‍👩‍👧 ", "\u00a0", "-", ", "]
    between = [" "] * 9 + ["\n", "  ", "\n\n  ", "\t", *signs]
    words = " ".join(OLD + NEW).split()
    lengths = [0, 1, 5, 40, 60, 90, 100, 400, 1000, *draw.choices(range(300), k=6)]
    return ["".join(draw.choice(words) + draw.choice(between) for _ in range(length)) for length in lengths]


@pytest.mark.parametrize("seed", range(6))
def test_tokens_are_those_of_the_whole_document(tokenizer: PreTrainedTokenizerBase, seed: int) -> None:
    texts = documents(seed)
    pieces = list(tokenised(tokenizer, texts))
    assert len(pieces) > len(texts)
    assert together(pieces) == [whole(tokenizer, text) for text in texts]


def test_no_call_is_given_more_than_fits(tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[int] = []
    kind = type(tokenizer)
    plain = kind.__call__

    def counting(self: object, text: str | list[str], **options: object) -> object:
        given.append(len(text) if isinstance(text, str) else sum(map(len, text)))
        return plain(self, text, **options)

    monkeypatch.setattr(kind, "__call__", counting)
    list(tokenised(tokenizer, [*documents(0), "x" * 5000, "y " * 5000, "\n" * 5000]))
    assert max(given) <= SIZES["_TOGETHER"]


@pytest.mark.parametrize("unit", ["x", "bade", "é", "漢", "👩‍👩‍👧", "\n", " ", "a\u0301"])
def test_a_word_without_an_end_is_cut_and_nothing_of_it_is_lost(tokenizer: PreTrainedTokenizerBase, unit: str) -> None:
    document = unit * 1500
    pieces = list(tokenised(tokenizer, [document, "bade"]))
    assert together(pieces)[1] == whole(tokenizer, "bade")
    again = list(tokenised(tokenizer, [document, "bade"]))
    assert pieces == again
    ids = together(pieces)[0]
    is_lossless = tokenizer.decode(whole(tokenizer, unit * 9), clean_up_tokenization_spaces=False) == unit * 9
    if is_lossless and tokenizer.unk_token_id not in ids:
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False).count(unit) >= 1500 - len(pieces)


def test_tokenizers_written_in_python_read_long_documents_between_blanks() -> None:
    texts = ["w1 " * 1000, "short", "x" * 3000, ""]
    tokenizer = ByT5Tokenizer()
    assert together(list(tokenised(tokenizer, texts))) == [whole(tokenizer, text) for text in texts]
    for text in texts:
        parts = list(between_blanks(text))
        assert "".join(parts) == text and max(map(len, parts)) <= SIZES["WINDOW"]
    assert all(part.startswith(" ") for part in list(between_blanks(texts[0]))[1:])


@pytest.mark.usefixtures("own_cache")
def test_a_packed_corpus_is_the_same_whatever_the_windows(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    corpus = datasets.Dataset.from_dict({"text": documents(3)})
    found = pack(corpus, tokenizer, 16, cache_dir=tmp_path / "windows")
    monkeypatch.undo()
    plain = pack(corpus, tokenizer, 16, cache_dir=tmp_path / "whole")
    assert (found.digest, found.tokens, len(found)) == (plain.digest, plain.tokens, len(plain))
    assert all((found.documents(i) == plain.documents(i)).all() for i in range(len(found)))


@pytest.mark.usefixtures("own_cache")
def test_documents_tokenised_ahead_are_packed_bit_for_bit_as_by_one_call_after_the_other(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    corpus = datasets.Dataset.from_dict({"text": [text for seed in range(4) for text in documents(seed)]})
    tokenizer("w1 w2 w3", truncation=True, max_length=4)  # leaves its mark on the backend
    assert tokenising._backend(tokenizer) is not None
    pack(corpus, tokenizer, 16, cache_dir=tmp_path / "ahead")
    monkeypatch.setattr(tokenising, "_backend", lambda _: None)
    pack(corpus, tokenizer, 16, cache_dir=tmp_path / "calls")
    ahead, calls = ({p.name: p.read_bytes() for p in (tmp_path / out).rglob("*.*")} for out in ("ahead", "calls"))
    assert ahead == calls and {"ids.bin", "starts.bin", "meta.json"} <= ahead.keys()


def test_only_a_few_calls_are_ahead_of_what_is_asked_for(tokenizer: PreTrainedTokenizerBase) -> None:
    read: list[int] = []
    texts = ((read.append(i), "bade " * 10)[1] for i in range(10_000))
    found = tokenised(tokenizer, texts)
    for _ in range(5):
        next(found)
    assert len(read) <= 5 + SIZES["_DOCUMENTS"] * (tokenising._AHEAD + 2)
    found.close()


def test_what_goes_wrong_while_documents_are_read_ends_what_is_ahead(tokenizer: PreTrainedTokenizerBase) -> None:
    def texts() -> Iterator[str]:
        yield from ["bade"] * 20
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        list(tokenised(tokenizer, texts()))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("tokenising")]


@pytest.mark.parametrize("side", ["right", "left"])
def test_of_a_long_text_that_is_cut_only_its_end_is_tokenised(
    tokenizer: PreTrainedTokenizerBase, side: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [text for text in documents(4) if text]
    split = Split(texts, None, [0] * len(texts))
    monkeypatch.setattr(tokenizer, "truncation_side", side)
    longest = max(map(len, tokenising.enough(tokenizer, texts, 20)))
    assert longest < max(map(len, texts))
    found = LabelledTexts(split, tokenizer, 20)
    monkeypatch.setattr(tokenising, "WINDOW", 1 << 20)
    plain = LabelledTexts(split, tokenizer, 20)
    assert [found.digest(index) for index in range(len(texts))] == [plain.digest(index) for index in range(len(texts))]
