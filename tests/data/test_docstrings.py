"""The world of docstrings: opens with plain transformers, keeps its test set to itself, repeats bit for bit."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer

from recyclable.data import docstrings
from recyclable.data.docstrings import DocstringWorld, write_docstring_world
from recyclable.errors import InputError

SMALL = {"sentences": 500, "train": 300, "dev": 20, "test": 40, "vocab_size": 1500, "layers": 1, "width": 64}


FEWER = {  # the largest libraries take the longest to read
    "GENERAL": ("numpy", "mpmath"),
    "UPGRADE": ("datasets", "accelerate", "peft", "deepspeed", "huggingface_hub", "tensorboard"),
}


@pytest.fixture(scope="module", autouse=True)
def fewer_libraries() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, libraries in FEWER.items():
            patch.setattr(docstrings, name, libraries)
        yield


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, fewer_libraries: None) -> DocstringWorld:
    return write_docstring_world(tmp_path_factory.mktemp("world"), **SMALL)


def _rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _digests(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_base_opens_with_plain_transformers(world: DocstringWorld) -> None:
    tokenizer, model = AutoTokenizer.from_pretrained(world.base), AutoModelForMaskedLM.from_pretrained(world.base)
    text = _rows(world.task / "test.jsonl")[0]["text"]
    batch = tokenizer(text, return_tensors="pt")
    assert batch["input_ids"][0, 0] == tokenizer.cls_token_id and batch["input_ids"][0, -1] == tokenizer.sep_token_id
    assert tokenizer.unk_token_id not in batch["input_ids"]
    assert tokenizer.mask_token_id is not None and len(tokenizer) == model.config.vocab_size <= SMALL["vocab_size"]
    with torch.no_grad():
        assert model(**batch).logits.shape == (*batch["input_ids"].shape, len(tokenizer))


def test_tokenizer_ignores_case_and_cuts_unknown_words_into_pieces(world: DocstringWorld) -> None:
    tokenizer = AutoTokenizer.from_pretrained(world.base)
    assert tokenizer.tokenize("The TENSOR") == tokenizer.tokenize("the tensor")
    assert any(piece.startswith("##") for piece in tokenizer.tokenize("untensorisable"))


def test_no_dev_or_test_sentence_in_a_corpus_and_none_twice(world: DocstringWorld) -> None:
    corpora = [
        row["text"] for place in (world.general, world.upgrade) for path in place.iterdir() for row in _rows(path)
    ]
    task = {part: [row["text"] for row in _rows(world.task / f"{part}.jsonl")] for part in ("train", "dev", "test")}
    everything = [text for texts in task.values() for text in texts]
    assert len(corpora) == len(set(corpora)) and len(everything) == len(set(everything))
    assert not set(corpora) & {*task["dev"], *task["test"]}
    assert set(task["train"]) <= {row["text"] for path in world.upgrade.iterdir() for row in _rows(path)}


def test_dev_and_test_have_as_many_of_every_label(world: DocstringWorld) -> None:
    for part, most in (("dev", SMALL["dev"]), ("test", SMALL["test"])):
        counts = Counter(row["label"] for row in _rows(world.task / f"{part}.jsonl"))
        assert counts == dict.fromkeys(world.labels, most)
    counts = Counter(row["label"] for row in _rows(world.task / "train.jsonl"))
    assert tuple(sorted(counts)) == world.labels and set(world.labels) <= set(docstrings.UPGRADE)
    assert len(world.labels) >= 6 and min(counts.values()) >= docstrings.FEWEST_TRAIN


def test_same_seed_writes_the_same_bytes_and_another_seed_does_not(world: DocstringWorld, tmp_path: Path) -> None:
    first = _digests(world.base.parent)
    assert _digests(write_docstring_world(tmp_path / "again", **SMALL).base.parent) == first
    stream = torch.random.get_rng_state()
    other = _digests(write_docstring_world(tmp_path / "other", seed=1, **SMALL).base.parent)
    assert torch.equal(torch.random.get_rng_state(), stream), "the caller's random stream moved"
    same = {path for path, digest in first.items() if other[path] == digest}
    assert not any(path.endswith((".jsonl", ".safetensors")) for path in same)


@pytest.mark.parametrize(
    ("docstring", "expected"),
    [
        ("Return the sum of all the given values.\nIt is exact.", ["Return the sum of all the given values."]),
        ("Args: the values that are to be added here.", []),
        (">>> Add up all of the given values.\n", []),
        ("Returns: The sum of all the values given.", ["The sum of all the values given."]),
    ],
)
def test_only_whole_sentences_of_prose_are_kept(docstring: str, expected: list[str]) -> None:
    assert list(docstrings._prose(docstring)) == expected


def test_too_few_libraries_is_an_input_error_that_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(docstrings, "UPGRADE", ("torch", "no_such_library"))
    with pytest.raises(InputError, match=r"expected .*no_such_library"):
        write_docstring_world(tmp_path / "world", **SMALL)
    assert not (tmp_path / "world").exists()


def test_a_library_is_read_without_being_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "explosive_package"
    package.mkdir()
    (package / "__init__.py").write_text('"""This package must never be imported by anyone."""\nraise RuntimeError\n')
    monkeypatch.syspath_prepend(tmp_path)
    assert docstrings._sentences("explosive_package", 9, set()) == ["This package must never be imported by anyone."]
    assert docstrings._sentences("no_such_library", 9, set()) == []
