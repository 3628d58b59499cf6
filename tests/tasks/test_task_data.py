"""What of a task a run uses: shots, and limits of the splits that are scored."""

from __future__ import annotations

from pathlib import Path

import pytest
from families import config, drawn
from rows import write_rows
from spoken import CHATML, byte_level
from transformers import AutoModelForCausalLM
from verbs import Verbs
from worlds import make_base, make_model, make_task

from recyclable.errors import InputError
from recyclable.recipes.tune_settings import read_tune_settings
from recyclable.tasks.parts.task import load_task
from recyclable.tasks.parts.task_data import task_data
from recyclable.weights.base import Base
from recyclable.weights.reader import Reader


def test_dev_and_test_are_limited_to_fixed_subsets(tmp_path: Path) -> None:
    base, task = make_base(tmp_path / "base"), make_task(tmp_path / "task")
    given = {"base": str(base), "task": str(task), "out": tmp_path / "out", "max_steps": 1, "learning_rate": 1e-3}

    def sizes(**limits: int) -> list[int]:
        settings = read_tune_settings({**given, "max_length": 32, **limits}, "tune.yaml")
        data = task_data(settings, load_task(task), Reader.of(Base(base)))
        return [len(data.train), len(data.dev), len(data.test)]

    train, dev, test = sizes()
    assert sizes(max_dev_examples=5) == [train, 5, test]
    assert sizes(max_test_examples=7) == [train, dev, 7]
    assert sizes(max_test_examples=test + 1) == [train, dev, test]


def test_what_max_length_cuts_is_told_once_for_each_split(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = byte_level()
    model = drawn(config("llama", vocab_size=len(tokenizer), eos_token_id=2), AutoModelForCausalLM)
    base = make_model(tmp_path / "base", model, tokenizer)
    for split, count in {"train": 3, "dev": 1, "test": 2}.items():
        rows = [{"prompt": "Hello", "response": "yes"}, *[{"prompt": "Hello", "response": " yes" * 30}] * count]
        write_rows(tmp_path / "task" / f"{split}.jsonl", rows if split != "dev" else rows[:1])
    given = {"base": str(base), "task": str(tmp_path / "task"), "out": tmp_path / "out", "max_steps": 1}
    settings = read_tune_settings({**given, "learning_rate": 1e-3, "max_length": 16}, "tune.yaml")
    data = task_data(settings, load_task(tmp_path / "task"), Reader.of(Base(base)))
    assert data.metric == "log_likelihood" and len(data.train) == 4
    told = "responses are cut at max_length 16, 0 of them wholly"
    assert capsys.readouterr().out.splitlines() == [f"notice: train: 3 of 4 {told}", f"notice: test: 2 of 3 {told}"]
    settings = read_tune_settings({**given, "learning_rate": 1e-3, "max_length": 3}, "tune.yaml")
    with pytest.raises(InputError, match="max_length: is 3, which "):
        task_data(settings, load_task(tmp_path / "task"), Reader.of(Base(base)))


def test_tune_refuses_responses_without_a_token_or_a_stop_to_learn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    verbs, tokenizer = Verbs(tmp_path, capsys), byte_level(CHATML, end="<|other|>")
    end = tokenizer.convert_tokens_to_ids("<|other|>")
    model = drawn(config("llama", vocab_size=len(tokenizer), eos_token_id=end), AutoModelForCausalLM)
    base = make_model(tmp_path / "base", model, tokenizer)
    chat = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "yes"}]
    rows = {"pairs": {"prompt": "Hello there", "response": " yes"}, "chats": {"messages": chat}}
    for task, row in rows.items():
        for split in ("train", "dev"):
            write_rows(tmp_path / task / f"{split}.jsonl", [row] * 4)
    prompt, answer = (len(tokenizer(text)["input_ids"]) for text in rows["pairs"].values())
    for task, length, why in (
        ("pairs", prompt, f"max_length: is {prompt}, which leaves no token of any response in train to learn from"),
        ("pairs", prompt + answer, f"max_length: is {prompt + answer}, which cuts the end off every response in train"),
        ("chats", 32, "base: generation stops at '<|other|>', but no response in train has that"),
    ):
        asked = verbs.training("tune", base=base, task=tmp_path / task, max_length=length)
        assert why in verbs.refused(*asked)
