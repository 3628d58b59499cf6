"""Which kind of task rows are of, by the names of their columns and what these hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rows import write_rows

from recyclable.errors import InputError
from recyclable.tasks import every_kind
from recyclable.tasks.parts.columns import Column, Columns, choose, listed
from recyclable.tasks.parts.task import load_task

pytestmark = pytest.mark.usefixtures("own_cache")
WORDS = ["a", "b"]
CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
CELLS: dict[str, Any] = {
    "text": "a",
    "text_pair": "b",
    "tokens": WORDS,
    "tags": ["O", "B-X"],
    "prompt": "a",
    "question": "a",
    "response": "b",
    "messages": CHAT,
    "choices": WORDS,
    "answer": 1,
    "label": "x",
    "id": 7,
}


def problem(folder: Path, columns: str, **other: Any) -> str:
    row = {name: other.get(name, CELLS[name]) for name in columns.split()}
    second = {**row, "label": ["y"] if isinstance(row.get("label"), list) else "y"} if "label" in row else row
    return load_task({"train": str(write_rows(folder / "train.jsonl", [row, second]))}).problem


@pytest.mark.parametrize(
    ("columns", "kind"),
    [
        ("text label", "classification"),
        ("id label text text_pair", "classification"),
        ("tokens tags", "tokens"),
        ("text tokens tags", "tokens"),
        ("text label tokens tags", "classification"),
        ("prompt response", "generation"),
        ("prompt response id", "generation"),
        ("messages", "generation"),
        ("prompt messages", "generation"),
        ("question text messages", "generation"),
        ("prompt choices answer", "choice"),
        ("question choices answer", "choice"),
        ("prompt response choices answer", "choice"),
        ("question choices answer label", "choice"),
        ("text label question choices", "classification"),
        ("text label prompt response", "classification"),
        ("prompt text label", "classification"),
    ],
)
def test_the_columns_of_the_first_row_tell_the_kind(columns: str, kind: str, tmp_path: Path) -> None:
    assert problem(tmp_path, columns) == kind


@pytest.mark.parametrize(
    ("columns", "kind"),
    [("text label", "multi_label"), ("text label tokens tags", "tokens"), ("prompt text label", "multi_label")],
)
def test_lists_of_labels_are_told_from_labels(columns: str, kind: str, tmp_path: Path) -> None:
    assert problem(tmp_path, columns, label=["x"]) == kind


@pytest.mark.parametrize(
    ("columns", "lacking"),
    [
        ("id", "text"),
        ("id question", "choices"),
        ("question label", "text"),
        ("prompt", "response"),
        ("prompt choices", "answer"),
        ("choices answer", "prompt"),
        ("text tokens", "tags"),
        ("tokens label", "tags"),
        ("response", "prompt"),
    ],
)
def test_where_no_kind_has_all_its_columns_the_nearest_says_what_lacks(
    columns: str, lacking: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=rf"train\.jsonl, row 1: no column '{lacking}', found \["):
        problem(tmp_path, columns)


def test_a_named_column_says_which_layout_is_meant() -> None:
    layouts = [layout for kind in every_kind() for layout in kind.layouts]
    row = {name: CELLS[name] for name in ("text", "label", "prompt", "response", "messages", "tokens", "tags")}
    assert choose(layouts, {}, row) == Columns()
    for key, column in {"text": "tokens", "prompt": "prompt", "messages": "messages"}.items():
        assert choose(layouts, {key: column}, row).text.key == key
    assert choose(layouts, {"prompt": "text", "messages": "messages"}, row) == Columns()  # refused afterwards


def test_of_two_layouts_of_a_kind_the_one_that_is_there_is_read() -> None:
    first, second = (Columns(Column("x", name), None, None) for name in ("one", "two"))
    assert choose([first, second], {}, {"two": "a"}) == second
    assert choose([first, second], {}, {"one": "a", "two": "a"}) == first
    assert choose([first, second], {"x": "three"}, {"three": "a"}) == first


@pytest.mark.parametrize(("names", "text"), [(["a"], "`a`"), (["a", "b"], "`a` and `b`"), ("abc", "`a`, `b` and `c`")])
def test_names_are_listed_as_people_do(names: list[str], text: str) -> None:
    assert listed(names) == text
