"""CSV and TSV: a quote that opens a cell is one where the file is quoted, else a character; each fault has its line."""

from __future__ import annotations

import csv
import gzip
import io
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recyclable.data.files import read_rows
from recyclable.errors import InputError


def rows_of(path: Path) -> list[list[Any]]:
    return [list(row.values()) for _, row in read_rows(path)]


def written(path: Path, *lines: str, end: str = "\n") -> Path:
    content = "".join(line + end for line in lines).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def by_pandas(path: Path, quoting: int) -> list[list[Any]]:
    frame = pd.read_csv(path, sep="\t" if ".tsv" in path.name else ",", quoting=quoting, dtype=str, na_filter=False)
    return [[cell or None for cell in row] for row in frame.to_numpy().tolist()]


UNQUOTED = {
    "closed in a later line": ["w1 w2\ta", '" w4 w5\tb', "w7\ta", 'w9 "\tb', '"\tb', "w3\ta"],
    "never closed": ["w1 w2\ta", '" w4 w5\tb', "w7 w8\ta"],
    "closed before a tab": ["w1\ta", '"w4 w5\tb', "w7\ta", 'w8"\tb', "w9\ta"],
    "goes on behind the quotes": ['"w1" w2\ta', "w3\tb"],
    "a closed one beside one that is not": ['"w1"\ta', '"w2\tb', '""\ta'],
    "closed within the line, in another cell": ['" w1\tw2 "', "w3\tb"],
    "the last line": ["w1\ta", '"w2\tb'],
    "a label": ['w1\t"a', "w2\tb"],
}


@pytest.mark.parametrize("name", ["train.tsv", "train.tsv.gz"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("lines", UNQUOTED.values(), ids=UNQUOTED)
def test_an_unquoted_tsv_is_read_line_by_line(lines: list[str], end: str, name: str, tmp_path: Path) -> None:
    path = written(tmp_path / name, "text\tlabel", *lines, end=end)
    assert rows_of(path) == by_pandas(path, csv.QUOTE_NONE) == [line.split("\t") for line in lines]
    assert [place for place, _ in read_rows(path)] == list(range(2, len(lines) + 2))


QUOTED = {
    "cells over several lines": ['"w1', 'w2"\ta', "w3\tb"],
    "delimiters inside": ['"w1\tw2"\ta', "w3\tb"],
    "doubled quotes": ['"w1 ""w2"""\ta', '""""\tb'],
    "closed on their line": ['"w1"\ta', 'w2 "w3" w4\tb', 'w5"\t"b"'],
    "an empty line inside": ['"w1', "", 'w2"\ta', "", "w3\tb"],
    "blank lines between": ["", "w1\ta", "", '"w2"\tb'],
}


@pytest.mark.parametrize("name", ["train.tsv", "train.csv", "train.tsv.gz", "train.csv.gz"])
@pytest.mark.parametrize("lines", QUOTED.values(), ids=QUOTED)
def test_a_quoted_file_is_read_as_pandas_reads_it(lines: list[str], name: str, tmp_path: Path) -> None:
    delimiter = "\t" if ".tsv" in name else ","
    path = written(tmp_path / name, *(line.replace("\t", delimiter) for line in ["text\tlabel", *lines]))
    found = rows_of(path)
    assert found == by_pandas(path, csv.QUOTE_MINIMAL) and [row[-1] for row in found][-1] == "b"


cell = st.text(st.sampled_from('ab" ,\t\n'), max_size=5)


@given(
    st.lists(st.tuples(cell, cell, cell), min_size=1, max_size=6),
    st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
    st.sampled_from([",", "\t"]),
)
def test_what_the_csv_module_wrote_comes_back(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, ...]], quoting: Any, delimiter: str
) -> None:
    text = io.StringIO()
    csv.writer(text, delimiter=delimiter, quoting=quoting, lineterminator="\n").writerows([("x", "y", "z"), *rows])
    path = tmp_path_factory.mktemp("rows") / ("f.csv" if delimiter == "," else "f.tsv")
    path.write_bytes(text.getvalue().encode())
    lines = text.getvalue().splitlines()
    if delimiter == "\t" and all(line.count("\t") == 2 for line in lines if line):
        return  # a tab and a line end in one cell may look like two lines of a file without quoting
    assert [tuple(c or "" for c in row) for row in rows_of(path)] == rows


@given(st.lists(st.tuples(*[st.text(st.sampled_from('ab" '), min_size=1, max_size=6)] * 2), min_size=1, max_size=6))
def test_rows_of_a_tsv_without_quoting_are_its_lines(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, ...]]
) -> None:
    path = written(tmp_path_factory.mktemp("rows") / "f.tsv", "x\ty", '"\tz', *("\t".join(row) for row in rows))
    assert rows_of(path) == [['"', "z"], *map(list, rows)]


def test_csv_and_a_single_column_are_quoted_whatever_their_lines_look_like(tmp_path: Path) -> None:
    """A second line that fits the header by chance proves nothing."""
    path = written(tmp_path / "train.csv", "label,text", 'a,"w1', 'w2, w3"', "b,w4")
    assert rows_of(path) == by_pandas(path, csv.QUOTE_MINIMAL) == [["a", "w1\nw2, w3"], ["b", "w4"]]
    path = written(tmp_path / "corpus.tsv", "text", '"w1', 'w2"', "w3")
    assert rows_of(path) == by_pandas(path, csv.QUOTE_MINIMAL) == [["w1\nw2"], ["w3"]]
    path = written(tmp_path / "train.csv", "label,text", 'a,"w1', "b,w4")
    with pytest.raises(
        InputError, match=r"train\.csv, line 2: a cell opens here with a quote .* comma or the end of t"
    ):
        rows_of(path)


@pytest.mark.parametrize("name", ["train.tsv", "train.csv", "train.tsv.gz"])
@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["w1\ta", "w2", 'w3\t"b', "w4\tc"], r"line 3: found 1 cells, expected 2"),
        (["w1\ta", '"w2\tb', "w3", "w4\tc"], r'line 3: a cell opens here with a quote \("\) that is never closed, exp'),
        (
            ['w1\t"a"', '"x', 'y"\t"b', "w3"],
            r"line 4: a cell opens here with a quote .* never closed, .* or the end of",
        ),
        (['"w1" w2\ta', "w3"], r"line 2: a cell in quotes opens here and goes on behind them with ' w2.*', expected a"),
        (['"w1', 'w2" w3\ta'], r"line 2: a cell in quotes opens here and goes on behind them with ' w3.*', expected a"),
        (
            ['"w1', '"\ta\tx', "w2\tb"],
            r"line 2: found 3 cells in lines 2 to 3, which a quote holds together, expected 2",
        ),
        (["w1\ta\tb"], r"line 2: found 3 cells, expected 2 as in the header"),
    ],
)
def test_a_fault_names_the_line_where_its_cell_opens(lines: list[str], message: str, name: str, tmp_path: Path) -> None:
    delimiter = "\t" if ".tsv" in name else ","
    path = written(tmp_path / name, *(line.replace("\t", delimiter) for line in ["text\tlabel", *lines]))
    with pytest.raises(InputError, match=rf"{name}, {message}"):
        rows_of(path)


def test_the_rows_before_a_fault_are_given(tmp_path: Path) -> None:
    """One row at a time: nothing waits for the end of the file."""
    path = written(tmp_path / "train.tsv", "text\tlabel", "w1\ta", "w2")
    reader = read_rows(path)
    assert next(reader) == (2, {"text": "w1", "label": "a"})
    with pytest.raises(InputError, match="line 3: found 1 cells"):
        next(reader)
