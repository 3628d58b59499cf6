"""The order of a task's labels: as a task file or the data declares it, and tasks put into the order of a head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rows import write_rows

from recyclable.errors import InputError
from recyclable.tasks.parts.task import load_task, task_of

pytestmark = pytest.mark.usefixtures("own_cache")
NAMES = ["entailment", "neutral", "contradiction"]
IDS = [2, 0, 1, 1, 2]


def write_declared(path: Path, ids: list[Any], names: list[str] = NAMES, tokens: bool = False) -> Path:
    """Parquet as `datasets` writes it, with ClassLabel ids; of words where an id is a list."""
    kind, text = datasets.ClassLabel(names=names), datasets.Value("string")
    if tokens:
        data = {"tokens": [["w"] * len(tags) for tags in ids], "tags": ids}
        features = datasets.Features({"tokens": datasets.List(text), "tags": datasets.List(kind)})
    else:
        data, features = {"text": ["t"] * len(ids), "label": ids}, datasets.Features({"text": text, "label": kind})
    datasets.Dataset.from_dict(data, features=features).to_parquet(str(path))
    return path.parent


def test_class_ids_of_a_declared_feature_stay_what_they_are(tmp_path: Path) -> None:
    write_declared(tmp_path / "train.parquet", IDS)
    write_declared(tmp_path / "dev.parquet", [1])
    task = load_task(tmp_path)
    assert (task.labels, task.ordered) == (tuple(NAMES), True)
    assert {name: split.labels for name, split in task.splits.items()} == {"train": IDS, "dev": [1]}


def test_declared_classes_that_no_row_has_keep_their_place(tmp_path: Path) -> None:
    task = load_task(write_declared(tmp_path / "train.parquet", [2, 2]))
    assert (task.labels, task.splits["train"].labels) == (tuple(NAMES), [2, 2])


def test_tags_in_lists_keep_the_declared_order_too(tmp_path: Path) -> None:
    tags = [[1, 2, 0], [2]]
    task = load_task(write_declared(tmp_path / "train.parquet", tags, ["B-X", "I-X", "O"], tokens=True))
    assert (task.problem, task.labels, task.ordered) == ("tokens", ("B-X", "I-X", "O"), True)
    assert task.splits["train"].labels == tags


def test_a_task_file_has_the_last_word_on_the_order(tmp_path: Path) -> None:
    path = write_declared(tmp_path / "train.parquet", IDS) / "train.parquet"
    task = load_task({"train": str(path), "labels": sorted(NAMES)})
    assert (task.labels, task.ordered) == (tuple(sorted(NAMES)), True)
    assert [task.labels[i] for i in task.splits["train"].labels] == [NAMES[i] for i in IDS]


@pytest.mark.parametrize("names", [NAMES[::-1], ["entailment", "neutral", "no"], NAMES[:2]])
def test_splits_that_declare_other_labels_are_refused(names: list[str], tmp_path: Path) -> None:
    write_declared(tmp_path / "train.parquet", IDS)
    write_declared(tmp_path / "test.parquet", [0], names)
    with pytest.raises(InputError, match=r"test\.parquet: declares the labels .*, but .*train\.parquet entailment, ne"):
        load_task(tmp_path)
    spec = {split: str(tmp_path / f"{split}.parquet") for split in ("train", "test")}
    if set(names) <= set(NAMES):  # names alone can be read in any order
        task = load_task({**spec, "labels": NAMES})
        assert [task.labels[i] for i in task.splits["test"].labels] == [names[0]]


def test_names_in_another_file_are_read_in_the_declared_order(tmp_path: Path) -> None:
    write_declared(tmp_path / "train.parquet", IDS)
    write_rows(tmp_path / "dev.jsonl", [{"text": "t", "label": "neutral"}])
    assert load_task(tmp_path).splits["dev"].labels == [1]
    write_rows(tmp_path / "dev.jsonl", [{"text": "t", "label": "contra"}])
    with pytest.raises(InputError, match=r"dev\.jsonl, row 1: label 'contra' is not in the list of labels, which"):
        load_task(tmp_path)


def test_a_missing_label_is_missing_and_one_beyond_the_names_is_refused(tmp_path: Path) -> None:
    write_declared(tmp_path / "train.parquet", [0, 1, -1])
    with pytest.raises(InputError, match=r"train\.parquet, row 3: column 'label' is empty"):
        load_task(tmp_path)
    table = pq.read_table(tmp_path / "train.parquet")
    beyond = table.set_column(1, table.schema.field(1), [pa.array([0, 1, 3])])
    pq.write_table(beyond, tmp_path / "train.parquet")
    with pytest.raises(InputError, match=r"train\.parquet, row 3: label '3' is not in the list of labels"):
        load_task(tmp_path)


@pytest.mark.parametrize(
    "declared",
    ["{", "\xff", '{"info": 3}', '{"info": {"features": {"label": {"_type": "ClassLabel", "names": 3}}}}', "[1]"],
)
def test_a_damaged_declaration_is_refused_or_none(declared: str, tmp_path: Path) -> None:
    table = pa.table({"text": ["t", "t"], "label": [0, 1]})
    pq.write_table(
        table.replace_schema_metadata({b"huggingface": declared.encode("latin1")}), tmp_path / "train.parquet"
    )
    if declared == "[1]":
        assert load_task(tmp_path).labels == ("0", "1")
        return
    with pytest.raises(InputError, match=r"train\.parquet: declares its columns as no version of `datasets` does"):
        load_task(tmp_path)


def test_one_declared_class_is_too_few(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"train\.parquet: every label is 'only', expected at least two classes"):
        load_task(write_declared(tmp_path / "train.parquet", [0, 0], ["only"]))


@pytest.mark.parametrize(
    ("labels", "ordered"),
    [([0, 1, 2], True), (["1", "0"], True), ([0, 2], False), ([1, 2], False), (["a", "b"], False), ([0.5, 1], True)],
)
def test_only_whole_numbers_from_0_tell_their_own_order(labels: list[Any], ordered: bool, tmp_path: Path) -> None:
    write_rows(tmp_path / "train.jsonl", [{"text": "t", "label": label} for label in labels])
    task = load_task(tmp_path)
    assert task.ordered is ordered
    assert load_task({"train": str(tmp_path / "train.jsonl"), "labels": ["0", "1", "2", "a", "b", "0.5"]}).ordered


def test_files_without_a_declared_order_have_the_digest_they_had(tmp_path: Path) -> None:
    """Manifests written long ago hold it."""
    write_rows(tmp_path / "train.jsonl", [{"text": "x", "label": "b"}, {"text": "y", "label": "a"}])
    found = load_task(tmp_path).digest
    assert found == "68c49f5c9434108b3bc752cbb2fdb47adb1800ca0b20a579a16fc951f9625a5e"


def test_a_task_in_another_order_is_what_a_task_file_with_that_order_gives(tmp_path: Path) -> None:
    write_rows(tmp_path / "train.jsonl", [{"text": "t", "label": label} for label in ("c", "a", "b", "a")])
    write_rows(tmp_path / "dev.jsonl", [{"text": "u", "label": "b"}])
    files = {split: str(tmp_path / f"{split}.jsonl") for split in ("train", "dev")}
    task, wanted = load_task({"name": "x", **files}), load_task({"name": "x", **files, "labels": ["b", "c", "a"]})
    assert not task.ordered and task.labels == ("a", "b", "c")
    assert task.in_order(["b", "c", "a"]) == wanted
    assert wanted.in_order(("a", "b", "c")).splits == task.splits
    assert task.in_order(task.labels).ordered and task.in_order(task.labels).splits == task.splits


def test_tags_in_another_order_are_the_same_tags(tmp_path: Path) -> None:
    rows = [{"tokens": ["a", "b", "c"], "tags": ["B-X", "O", "I-X"]}, {"tokens": ["d"], "tags": ["O"]}]
    write_rows(tmp_path / "train.jsonl", rows)
    task = load_task(tmp_path).in_order(["I-X", "O", "B-X"])
    assert [[task.labels[i] for i in tags] for tags in task.splits["train"].labels] == [row["tags"] for row in rows]
    assert task.splits["train"].labels == [[2, 1, 0], [1]]


@pytest.mark.parametrize("labels", [["a"], ["a", "b", "c"], ["a", "c"], ["a", "a"], []])
def test_an_order_of_other_labels_is_refused(labels: list[str], tmp_path: Path) -> None:
    write_rows(tmp_path / "train.jsonl", [{"text": "t", "label": label} for label in ("a", "b")])
    with pytest.raises(InputError, match=r"has labels \['a', 'b'\], expected \["):
        load_task(tmp_path).in_order(labels)


def test_what_a_manifest_says_of_a_task_has_an_order() -> None:
    assert task_of({"name": "x", "problem": "classification", "labels": ["b", "a"], "digest": None}).ordered
