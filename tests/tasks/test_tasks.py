"""Labelled tasks: every format, directories and task files, class names, every mistake."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from rows import write_rows

from recyclable.data.split import Split
from recyclable.errors import InputError
from recyclable.tasks.parts.task import load_task

pytestmark = pytest.mark.usefixtures("own_cache")
ROWS = [{"text": f'text, "{i}" é', "label": ["no", "yes"][i % 2]} for i in range(6)]
FORMATS = ["jsonl", "json", "csv", "tsv", "jsonl.gz", "json.gz", "csv.gz", "tsv.gz", "parquet"]


@pytest.fixture
def write_task(tmp_path: Path) -> Callable[..., Path]:
    """Write splits as .jsonl from lists of labels (or of rows) into one folder; returns the folder."""

    def write(suffix: str = "jsonl", **splits: list[Any]) -> Path:
        for split, items in splits.items():
            rows = [
                item if isinstance(item, dict) else {"text": f"t{i}", "label": item} for i, item in enumerate(items)
            ]
            write_rows(tmp_path / f"{split}.{suffix}", rows)
        return tmp_path

    return write


@pytest.mark.parametrize("suffix", FORMATS)
def test_every_format_gives_the_same_task(suffix: str, write_task: Callable) -> None:
    task = load_task(write_task(suffix, train=ROWS, dev=ROWS[:3], test=ROWS[3:]))
    assert (task.problem, task.labels) == ("classification", ("no", "yes"))
    assert task.splits["train"] == Split([row["text"] for row in ROWS], None, [0, 1, 0, 1, 0, 1])
    assert {name: len(split) for name, split in task.splits.items()} == {"train": 6, "dev": 3, "test": 3}


@pytest.mark.parametrize("name", ["dev", "validation", "valid", "val"])
def test_dev_has_four_names(name: str, write_task: Callable) -> None:
    assert set(load_task(write_task(train=[0, 1], **{name: [0]})).splits) == {"train", "dev"}


def test_train_alone_is_enough_and_other_files_are_left_alone(write_task: Callable, tmp_path: Path) -> None:
    (tmp_path / "meta.json").write_text("{}")
    (tmp_path / "train.md").write_text("notes")
    task = load_task(str(write_task(train=[0, 1])))
    assert set(task.splits) == {"train"}
    assert task.name == tmp_path.name


def test_pairs_are_read(write_task: Callable) -> None:
    rows = [{"text": "a", "text_pair": "b", "label": 0}, {"text": "c", "text_pair": "d", "label": 1}]
    assert load_task(write_task(train=rows)).splits["train"] == Split(["a", "c"], ["b", "d"], [0, 1])


def test_take_picks_examples_in_the_order_asked() -> None:
    split = Split(["a", "b", "c"], ["x", "y", "z"], [0, 1, 2])
    assert split.take([2, 0]) == Split(["c", "a"], ["z", "x"], [2, 0])
    assert len(split.take([])) == 0


@pytest.mark.parametrize(
    ("labels", "names", "indices"),
    [
        (["b", "a", "b"], ("a", "b"), [1, 0, 1]),
        ([10, 2, 2], ("2", "10"), [1, 0, 0]),
        ([-1, 1, 0], ("-1", "0", "1"), [0, 2, 1]),
        ([True, False], ("False", "True"), [1, 0]),
        ([1.0, 0.0, 1], ("0", "1"), [1, 0, 1]),
        (["01", "1", "1.0"], ("01", "1", "1.0"), [0, 1, 2]),
        (["0.5", "1.5"], ("0.5", "1.5"), [0, 1]),
    ],
)
def test_class_names_of_typed_labels(labels: list[Any], names: tuple, indices: list, write_task: Callable) -> None:
    task = load_task(write_task(train=labels))
    assert (task.problem, task.labels, task.splits["train"].labels) == ("classification", names, indices)


def test_csv_labels_stay_as_they_are_written(write_task: Callable) -> None:
    assert load_task(write_task("csv", train=["01", "1", "NA"])).labels == ("01", "1", "NA")


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_numbers_with_a_fractional_part_make_a_regression(suffix: str, write_task: Callable) -> None:
    task = load_task(write_task(suffix, train=[1.0, 2.5, 3.0], test=[1.0, 9.0]))
    assert (task.problem, task.labels) == ("regression", ())
    assert task.splits["train"].labels == [1.0, 2.5, 3.0]
    assert task.splits["test"].labels == [1.0, 9.0]


def test_a_name_among_numbers_in_csv_makes_a_classification(write_task: Callable) -> None:
    assert load_task(write_task("csv", train=["1.5", "x"])).problem == "classification"


def test_a_task_file_names_paths_columns_and_labels(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    rows = [{"premise": "a", "hypothesis": "b", "gold": 1}, {"premise": "c", "hypothesis": "d", "gold": 0}]
    write_rows(tmp_path / "data" / "first.csv", rows)
    (tmp_path / "nli.yaml").write_text(
        "train: data/first.csv\ntest: data/first.csv\n"
        "text: premise\ntext_pair: hypothesis\nlabel: gold\nlabels: [1, 0]\n"
    )
    task = load_task(tmp_path / "nli.yaml")
    assert (task.name, task.labels) == ("nli", ("1", "0"))
    assert task.splits["train"] == task.splits["test"] == Split(["a", "c"], ["b", "d"], [0, 1])


def test_task_yaml_in_a_directory_is_found_and_gives_name_and_problem(write_task: Callable, tmp_path: Path) -> None:
    write_task(train=[1, 2])
    (tmp_path / "task.yaml").write_text("name: stars\ntrain: train.jsonl\nproblem: regression\n")
    task = load_task(tmp_path)
    assert (task.name, task.problem, task.splits["train"].labels) == ("stars", "regression", [1.0, 2.0])


def test_a_dict_says_the_same_as_a_task_file(write_task: Callable, tmp_path: Path) -> None:
    path = write_task(train=[0.5, 2.5]) / "train.jsonl"
    task = load_task({"name": "x", "train": str(path), "problem": "classification", "labels": [0.5, 1.5, 2.5]})
    assert (task.name, task.labels, task.splits["train"].labels) == ("x", ("0.5", "1.5", "2.5"), [0, 2])


def test_labels_that_are_listed_are_classes_even_where_they_are_numbers(write_task: Callable) -> None:
    path = write_task(train=[0.5, 2.5]) / "train.jsonl"
    task = load_task({"train": str(path), "labels": [2.5, 0.5]})
    assert (task.problem, task.labels, task.splits["train"].labels) == ("classification", ("2.5", "0.5"), [1, 0])


def test_a_hub_data_set_gives_its_splits_and_label_names(monkeypatch: pytest.MonkeyPatch) -> None:
    features = datasets.Features({"s": datasets.Value("string"), "label": datasets.ClassLabel(names=["pos", "neg"])})

    def part(*labels: int) -> datasets.Dataset:
        return datasets.Dataset.from_dict({"s": ["a"] * len(labels), "label": labels}, features=features)

    hub = datasets.DatasetDict({"train": part(0, 1), "validation": part(1), "test": part(-1), "extra": part(0)})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: hub)
    task = load_task({"dataset": "some/task:en", "text": "s", "test": None})
    assert (task.name, task.labels, task.ordered) == ("some/task:en", ("pos", "neg"), True)
    assert {name: split.labels for name, split in task.splits.items()} == {"train": [0, 1], "dev": [1]}
    assert load_task({"dataset": "some/task", "text": "s", "test": "extra"}).splits["test"].labels == [0]
    with pytest.raises(InputError, match="some/task, split test, row 1: column 'label' is empty"):
        load_task({"dataset": "some/task", "text": "s"})
    with pytest.raises(InputError, match=r"some/task: no split 'nope', found \['extra', 'test'"):
        load_task({"dataset": "some/task", "text": "s", "dev": "nope"})


def test_a_hub_data_set_that_cannot_be_fetched_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach it")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(InputError, match=r"some/task: no such path .* hub .*Couldn't reach it"):
        load_task({"dataset": "some/task"})


def test_the_digest_follows_content_alone(write_task: Callable, tmp_path: Path) -> None:
    digest = load_task(write_task(train=["a", "b"], dev=["a"])).digest
    assert len(digest) == 64
    spec = {"name": "other", "train": str(tmp_path / "train.jsonl"), "dev": str(tmp_path / "dev.jsonl")}
    assert load_task(spec).digest == digest
    others = [
        load_task({**spec, "labels": ["b", "a"]}).digest,
        load_task({"train": spec["train"], "test": spec["dev"]}).digest,
        load_task(write_task(train=["a", "b"], dev=["b"])).digest,
        load_task(write_task(train=["a", "b", "b"], dev=["a"])).digest,
    ]
    assert len({digest, *others}) == 5


def row(**changes: Any) -> dict[str, Any]:
    return {"text": "t", "label": "a", **changes}


GOOD = [row(), row(label="b")]


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ({"dev": GOOD}, "no train split"),
        ({"train": [{"text": "t", "id": 1}]}, r"train\.jsonl, row 1: no column 'label', found \['id', 'text'\]"),
        ({"train": [{"body": "t", "label": 1}]}, r"train\.jsonl, row 1: no column 'text', found \['body', 'label'\]"),
        ({"train": [*GOOD, {"text": "t"}]}, r"train\.jsonl, row 3: no column 'label'"),
        ({"train": GOOD, "dev": [row(label="c")]}, r"dev\.jsonl, row 1: label 'c' is not in train, which has a, b"),
        ({"train": GOOD, "test": [*GOOD, row(label=0)]}, r"test\.jsonl, row 3: label '0' is not in train"),
        ({"train": GOOD, "dev": []}, r"dev\.jsonl: this split is empty"),
        ({"train": []}, r"train\.jsonl: this split is empty"),
        ({"train": [*GOOD, row(label=None)]}, r"train\.jsonl, row 3: column 'label' is empty \(null\)"),
        ({"train": [*GOOD, row(label=float("nan"))]}, r"train\.jsonl, row 3: column 'label' is empty \(null\)"),
        ({"train": [*GOOD, row(label="\ud800")]}, r"train\.jsonl, row 3: column 'label' is not valid UTF-8"),
        ({"train": GOOD, "dev": [row(text=None)]}, r"dev\.jsonl, row 1: column 'text' is empty \(null\)"),
        ({"train": [row(text=3)]}, r"train\.jsonl, row 1: column 'text' is 3, expected a string"),
        (
            {"train": [row(), row(label=["a"])]},
            r"train\.jsonl, row 2: column 'label' is \['a'\], expected a string or a number",
        ),
        ({"train": [row(label=0.5), row(label="x")]}, r"train\.jsonl, row 2: label 'x', expected a finite number"),
        ({"train": [row(label=0.5)], "dev": [row(label=True)]}, r"dev\.jsonl, row 1: label True, expected a finite"),
        ({"train": [row(label=0.5), row(label=float("inf"))]}, r"train\.jsonl, row 2: label inf, expected a finite"),
        ({"train": [row(), row()]}, r"train\.jsonl: every label is 'a', expected at least two classes"),
        ({"train": [row(text_pair="p"), row(label="b")]}, r"train\.jsonl, row 2: no column 'text_pair'"),
        ({"train": [row(), row(text_pair="p")]}, r"train\.jsonl, row 2: column 'text_pair' is new here"),
        ({"train": [row(text_pair=None)]}, r"train\.jsonl, row 1: column 'text_pair' is empty"),
        ({"train": [row(text_pair="p"), row(text_pair="p", label="b")], "dev": GOOD}, r"dev\.jsonl: no second text"),
        (
            {"train": GOOD, "dev": GOOD, "validation": GOOD},
            "both dev.jsonl and validation.jsonl could be the dev split",
        ),
    ],
)
def test_bad_content_is_an_input_error(splits: dict[str, list], message: str, write_task: Callable) -> None:
    with pytest.raises(InputError, match=message):
        load_task(write_task(**splits))


def test_an_empty_cell_in_csv_is_a_null(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("text,label\nx,a\n,b\n")
    with pytest.raises(InputError, match=r"train\.csv, row 3: column 'text' is empty \(null\)"):
        load_task(tmp_path)
    (tmp_path / "train.csv").write_text("text,label\nx,a\ny,\n")
    with pytest.raises(InputError, match=r"train\.csv, row 3: column 'label' is empty \(null\)"):
        load_task(tmp_path)


def test_broken_json_is_an_input_error(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"text": "a", "label": 0}\n{"text": ')
    with pytest.raises(InputError, match=r"train\.jsonl, line 2: broken JSON"):
        load_task(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("train: train.jsonl\nlable: y\n", r"task\.yaml: unknown key 'lable', expected one of name, train"),
        ("train: none.jsonl\n", r"none\.jsonl: no such file"),
        ("train: train.txt\n", r"train\.txt: a \.txt file has no labels"),
        ("train: train.xlsx\n", r"train\.xlsx: (no such file|unsupported extension)"),
        ("dev: train.jsonl\n", r"task\.yaml: no train split"),
        ("train: [a, b]\n", r"task\.yaml: train is \['a', 'b'\], expected a string"),
        (
            "train: train.jsonl\nproblem: ranking\n",
            r"task\.yaml: problem is 'ranking', expected one of choice, classification, generation, multi_label, regr",
        ),
        ("train: train.jsonl\nlabels: a\n", r"labels is 'a', expected a list"),
        ("train: train.jsonl\nlabels: [a, a]\n", r"expected at least two different names, each once"),
        ("train: train.jsonl\nlabels: [yes, no]\n", r"put quotes around names that YAML reads as true or false"),
        ("train: train.jsonl\nlabels: [a, c]\n", r"row 2: label 'b' is not in the list of labels, which has a, c"),
        ("train: train.jsonl\nlabels: [a, b]\nproblem: regression\n", r"task\.yaml: labels are for classes"),
        ("train: train.jsonl\nproblem: regression\n", r"row 1: label 'a', expected a finite number"),
        ("train: train.jsonl\ntext: body\n", r"train\.jsonl, row 1: no column 'body', found \['label', 'text'\]"),
        ("train: train.jsonl\ntext_pair: other\n", r"train\.jsonl, row 1: no column 'other'"),
        ("train: [\n", r"task\.yaml: broken YAML"),
        ("train: train.jsonl\nname: 2024-99-99\n", r"broken YAML: line 2, column 7: no value of the type timestamp"),
        ("train: !!int abc\n", r"broken YAML: line 1, column 8: no value of the type int"),
        ("labels: " + "[" * 3000, r"task\.yaml: broken YAML: nested too deeply"),
        (
            "train: train.jsonl\nlabels: &a [*a, b]\n",
            r"task\.yaml: broken YAML: line 2, column 9: holds itself by an alias",
        ),
        ('train: train.jsonl\nlabels: ["\\ud800", b]\n', r"task\.yaml: name or labels hold half a surrogate pair"),
        ("- train\n", r"task\.yaml: holds list, expected the keys"),
        ("", r"task\.yaml: holds NoneType, expected the keys"),
    ],
)
def test_a_bad_task_file_is_an_input_error(content: str, message: str, tmp_path: Path, write_task: Callable) -> None:
    write_task(train=GOOD)
    (tmp_path / "task.yaml").write_text(content)
    with pytest.raises(InputError, match=message) as caught:
        load_task(tmp_path / "task.yaml")
    assert "\n" not in str(caught.value)


def test_a_missing_source_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="none: no such file or directory"):
        load_task(tmp_path / "none")
    (tmp_path / "train.jsonl").write_text("{}")
    with pytest.raises(InputError, match=r"train\.jsonl: expected a directory .* or a task file"):
        load_task(tmp_path / "train.jsonl")
    with pytest.raises(InputError, match="task: unknown key 'path'"):
        load_task({"path": "x"})


def test_the_real_tasks_have_the_rows_and_labels_they_declare(real_data: Path) -> None:
    folders = sorted(path.parent for path in (real_data / "tasks").glob("*/meta.json"))
    assert folders
    for folder in folders:
        meta = json.loads((folder / "meta.json").read_text())
        task = load_task(folder)
        assert task.name == folder.name
        assert {name: len(split) for name, split in task.splits.items()} == meta["splits"]
        assert set(task.labels) == set(map(str, meta["labels"]))


# what is odd and not wrong


@pytest.mark.parametrize(
    ("labels", "told"),
    [
        (("left", "right"), None),
        (("left", "left "), "'left', 'left '"),
        (("left", "Left"), "'Left', 'left'"),
        (("caf\u00e9", "cafe\u0301"), r"'cafe\u0301', 'caf\xe9'"),
        (("a  b", "a b"), "'a  b', 'a b'"),
        (("\ufb01n", "fin"), r"'fin', '\ufb01n'"),
        (("1", "1.0"), None),
    ],
)
def test_classes_that_look_alike_are_told(
    labels: tuple[str, str], told: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_rows(
        tmp_path / "train.jsonl",
        [row(text="a", label=labels[0]), row(text="b", label=labels[1]), row(text="c", label="other")],
    )
    load_task({"train": str(tmp_path / "train.jsonl"), "name": "t"})
    said = capsys.readouterr().out
    assert said == ("" if told is None else f"notice: t: classes that look alike are told apart: {told}\n")
    load_task({"train": str(tmp_path / "train.jsonl"), "labels": [*labels, "other"]})
    assert capsys.readouterr().out == ""  # whoever lists them knows


def test_a_split_whose_texts_are_all_blank_is_refused(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "train.jsonl", [row(text=" "), row(text="", label="b"), row(text="\n\u2003")])
    with pytest.raises(InputError, match=r"train\.jsonl: every text is blank, expected some to read"):
        load_task({"train": str(path)})
    write_rows(tmp_path / "train.jsonl", [row(text=" "), row(label="b")])
    assert len(load_task({"train": str(path)}).splits["train"]) == 2
    write_rows(tmp_path / "train.jsonl", [{"tokens": [" ", ""], "tags": ["O", "B-X"]}])
    with pytest.raises(InputError, match="every text is blank"):
        load_task({"train": str(path)})
