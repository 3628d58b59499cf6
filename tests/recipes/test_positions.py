"""Models with positions for few tokens: an adapter's prompts take some of them, in training and in answering."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from decoders import make_decoder
from verbs import Verbs
from worlds import WORDS

POSITIONS, PROMPTS = 64, 20
"""Of the base; before a text."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_decoder(tmp_path_factory.mktemp("positions") / "base", "gpt2", n_positions=POSITIONS)


@pytest.fixture
def verbs(tmp_path: Path, capsys: pytest.CaptureFixture) -> Verbs:
    return Verbs(tmp_path, capsys)


def _task(folder: Path, longest: int) -> Path:
    """Prompts to answer, of 4 words, one of `longest` in dev and test."""
    folder.mkdir()
    for split in ("train", "dev", "test"):
        lengths = [4, 4, 4, 4 if split == "train" else longest]
        rows = [{"prompt": " ".join(WORDS[:words]), "response": " ".join(WORDS[5:8])} for words in lengths]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize("tuning", ["prompt", "prefix"])
def test_long_prompts_are_answered_beside_an_adapters_prompts(
    verbs: Verbs, base: Path, tuning: str, tmp_path: Path
) -> None:
    task = _task(tmp_path / "task", POSITIONS - PROMPTS + 1)
    settings = {"base": base, "task": task, "tuning": tuning, "num_virtual_tokens": PROMPTS}
    status, said = verbs.run(*verbs.training("tune", **settings))
    assert status == 0, said
    status, said = verbs.run("evaluate", "--weights", verbs.out, "--base", base, "--task", task)
    assert status == 0, said


def test_texts_without_room_beside_an_adapters_prompts_are_refused_before_tuning(
    verbs: Verbs, base: Path, tmp_path: Path
) -> None:
    settings = {"base": base, "task": _task(tmp_path / "task", 4), "tuning": "prompt", "num_virtual_tokens": PROMPTS}
    most = POSITIONS - PROMPTS
    said = verbs.refused(*verbs.training("tune", **settings, max_length=most + 1))
    assert f"max_length: is {most + 1}, but {base} has positions for {most} tokens at most beside {PROMPTS}" in said


def test_text_is_not_measured_in_sequences_that_are_too_long(verbs: Verbs, base: Path, tmp_path: Path) -> None:
    task, corpus = _task(tmp_path / "task", 4), tmp_path / "corpus.txt"
    corpus.write_text("\n".join([" ".join(WORDS[:60])] * 8))
    assert verbs.run(*verbs.training("tune", base=base, task=task))[0] == 0
    evaluate = ["evaluate", "--weights", verbs.out, "--base", base, "--task", task, "--corpus", corpus]
    said = verbs.refused(*evaluate, "--corpus-length", POSITIONS + 1)
    assert f"corpus_length: is {POSITIONS + 1}, but {base} has positions for {POSITIONS}" in said
