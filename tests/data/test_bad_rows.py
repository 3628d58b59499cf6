"""Every reader meets every kind of bad row: refused with its place, or left out and counted, the others as they are."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recyclable.data import lines
from recyclable.data.bad_rows import BadRow, BadRows
from recyclable.data.corpus import load_corpus
from recyclable.data.files import read_rows
from recyclable.errors import InputError
from recyclable.tasks.parts.task import load_task

pytestmark = pytest.mark.usefixtures("own_cache")
GOOD = [f"w{i} w{i + 1}" for i in range(12)]
BAD_AT = 5  # so many good rows stand before the bad one


def line_file(row: Callable[[str], bytes], bad: bytes, head: bytes = b"") -> bytes:
    rows = [row(text) for text in GOOD]
    return head + b"\n".join([*rows[:BAD_AT], bad, *rows[BAD_AT:]]) + b"\n"


def as_text(text: str) -> bytes:
    return text.encode()


def as_json(text: str) -> bytes:
    return json.dumps({"text": text}).encode()


def as_cells(text: str) -> bytes:
    return f"{text},a".encode()


def as_tabs(text: str) -> bytes:
    return f"{text}\ta".encode()


def array(bad: bytes) -> bytes:
    rows = [as_json(text) for text in GOOD]
    return b"[" + b",\n".join([*rows[:BAD_AT], bad, *rows[BAD_AT:]]) + b"]"


def parquet(texts: pa.Array, rows_per_group: int = 100) -> bytes:
    buffer = io.BytesIO()
    table = pa.table({"text": texts})
    pq.write_table(table, buffer, compression="snappy", row_group_size=rows_per_group, use_dictionary=False)
    return buffer.getvalue()


def with_bytes(bad: bytes) -> pa.Array:
    """Strings one of which is no UTF-8, as nothing checks when it is written."""
    texts = [text.encode() for text in GOOD]
    binary = pa.array([*texts[:BAD_AT], bad, *texts[BAD_AT:]], pa.binary())
    return pa.Array.from_buffers(pa.string(), len(binary), binary.buffers())


def damaged_group() -> bytes:
    """Three row groups, of whose second a page is destroyed."""
    content = parquet(pa.array(GOOD), rows_per_group=4)
    column = pq.ParquetFile(io.BytesIO(content)).metadata.row_group(1).column(0)
    begin = column.data_page_offset
    return content[:begin] + bytes(255 - byte for byte in content[begin : begin + 8]) + content[begin + 8 :]


def members(*, cut: int | None = None, aligned: bool = True) -> bytes:
    """Three gzip members, four rows each, the second damaged or cut."""
    text = "".join(line + "\n" for line in GOOD)
    size = len("".join(line + "\n" for line in GOOD[:4])) - (0 if aligned else 3)
    parts = [gzip.compress(piece.encode(), mtime=0) for piece in (text[:size], text[size : 2 * size], text[2 * size :])]
    middle = parts[1][:cut] if cut else parts[1][:-6] + b"\0\0" + parts[1][-4:]
    return parts[0] + middle + parts[2]


JSON_HEAD, COMMAS, TABS = b"", b"text,n\n", b"text\tn\n"
NOT_UTF8, NUL = "not valid UTF-8", "NUL character"
ROWS = {
    "txt: bytes": ("a.txt", line_file(as_text, b"caf\xe9"), NOT_UTF8, "line 6"),
    "txt: a surrogate": ("a.txt", line_file(as_text, b"\xed\xa0\x80"), NOT_UTF8, "line 6"),
    "txt: overlong": ("a.txt", line_file(as_text, b"\xc0\xaf"), NOT_UTF8, "line 6"),
    "txt: cut character": ("a.txt", line_file(as_text, b"\xf0\x9f\x98"), NOT_UTF8, "line 6"),
    "txt: NUL": ("a.txt", line_file(as_text, b"a\0b"), NUL, "row 6"),
    "txt: too long": ("a.txt", line_file(as_text, b"x" * 4000), "too long", "line 6"),
    "txt.gz: bytes": ("a.txt.gz", gzip.compress(line_file(as_text, b"\xff")), NOT_UTF8, "line 6"),
    "jsonl: bytes": ("a.jsonl", line_file(as_json, b'{"text": "\xe9"}'), NOT_UTF8, "line 6"),
    "jsonl: bytes elsewhere": ("a.jsonl", line_file(as_json, b'{"text": "a", "n": "\xe9"}'), NOT_UTF8, "line 6"),
    "jsonl: half a pair": ("a.jsonl", line_file(as_json, b'{"text": "\\ud800"}'), NOT_UTF8, "row 6"),
    "jsonl: NUL": ("a.jsonl", line_file(as_json, b'{"text": "\\u0000"}'), NUL, "row 6"),
    "jsonl: raw NUL": ("a.jsonl", line_file(as_json, b'{"text": "\0"}'), "broken JSON", "line 6"),
    "jsonl: cut": ("a.jsonl", line_file(as_json, b'{"text": "a'), "broken JSON", "line 6"),
    "jsonl: no object": ("a.jsonl", line_file(as_json, b'["text"]'), "broken JSON", "line 6"),
    "jsonl: deep": ("a.jsonl", line_file(as_json, b"[" * 1900), "broken JSON", "line 6"),
    "jsonl: a long number": (
        "a.jsonl",
        line_file(as_json, b'{"n": ' + b"9" * 1900 + b', "text": 1}'),
        "wrong type",
        "row 6",
    ),
    "jsonl: wrong type": ("a.jsonl", line_file(as_json, b'{"text": {"a": 1}}'), "wrong type", "row 6"),
    "jsonl: no column": ("a.jsonl", line_file(as_json, b'{"body": "a"}'), "no column 'text'", "row 6"),
    "jsonl: too long": ("a.jsonl", line_file(as_json, as_json("x" * 4000)), "too long", "line 6"),
    "json: bytes": ("a.json", array(b'{"text": "\xe9"}'), NOT_UTF8, "item 6"),
    "json: no object": ("a.json", array(b"7"), "broken JSON", "item 6"),
    "json: wrong type": ("a.json", array(b'{"text": 7}'), "wrong type", "row 6"),
    "json: NUL": ("a.json", array(b'{"text": "\\u0000"}'), NUL, "row 6"),
    "csv: bytes": ("a.csv", line_file(as_cells, b"\xe9,a", COMMAS), NOT_UTF8, "line 7"),
    "csv: NUL": ("a.csv", line_file(as_cells, b"a\0,a", COMMAS), NUL, "row 7"),
    "csv: more cells": ("a.csv", line_file(as_cells, b"a,b,c", COMMAS), "wrong number of cells", "line 7"),
    "csv: fewer cells": ("a.csv", line_file(as_cells, b"a", COMMAS), "wrong number of cells", "line 7"),
    "csv: an open quote": ("a.csv", line_file(as_cells, b'"a,b', COMMAS), "broken quotes", "line 7"),
    "csv: behind a quote": ("a.csv", line_file(as_cells, b'"a"b,c', COMMAS), "broken quotes", "line 7"),
    "csv: too long": ("a.csv", line_file(as_cells, b"x" * 4000 + b",a", COMMAS), "too long", "line 7"),
    "tsv: bytes": ("a.tsv", line_file(as_tabs, b"\xe9\ta", TABS), NOT_UTF8, "line 7"),
    "tsv: more cells": ("a.tsv", line_file(as_tabs, b"a\tb\tc", TABS), "wrong number of cells", "line 7"),
    "parquet: bytes": ("a.parquet", parquet(with_bytes(b"\xe9")), "broken Parquet", "row 6"),
    "parquet: NUL": ("a.parquet", parquet(with_bytes(b"a\0b")), NUL, "row 6"),
}


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are too long from a few thousand characters on."""
    monkeypatch.setattr(lines, "LONGEST", 2000)
    monkeypatch.setattr("recyclable.data.delimited.LONGEST", 2000)


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize(("name", "content", "kind", "place"), ROWS.values(), ids=ROWS)
def test_a_bad_row_is_refused_or_left_out(name: str, content: bytes, kind: str, place: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(BadRow, match=f"{place}[:,]") as caught:
        load_corpus(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)
    bad = BadRows("skip")
    assert load_corpus(path, bad=bad)["text"][:] == GOOD
    assert bad.as_dict() == {kind: {"rows": 1, "first": f"{path}, {place}"}}
    again = BadRows("skip")
    assert load_corpus(path, bad=again)["text"][:] == GOOD and again.as_dict() == bad.as_dict()  # from the cache


@pytest.mark.parametrize("aligned", [True, False], ids=["between lines", "within lines"])
@pytest.mark.parametrize("cut", [None, 20], ids=["checksum", "cut"])
def test_a_broken_gzip_member_is_left_out_whole(cut: int | None, aligned: bool, tmp_path: Path) -> None:
    path = tmp_path / "a.txt.gz"
    path.write_bytes(members(cut=cut, aligned=aligned))
    with pytest.raises(InputError, match=r"a\.txt\.gz: broken gzip"):
        load_corpus(path)
    bad = BadRows("skip")
    found = load_corpus(path, bad=bad)["text"][:]
    if aligned:
        assert found == [*GOOD[:4], *GOOD[8:]] and [*bad.counts] == ["broken gzip member"]
    else:  # the line that begins before the gap is never joined to what stands behind it
        assert set(found) < set(GOOD) and found[:3] == GOOD[:3] and found[-3:] == GOOD[-3:]
        assert {*bad.counts} == {"broken gzip member", NOT_UTF8}


def test_what_stands_behind_a_broken_gzip_file_is_no_row(tmp_path: Path) -> None:
    whole = gzip.compress("".join(line + "\n" for line in GOOD).encode(), mtime=0)
    for number, content in enumerate((whole + b"\0" * 100, whole + b"garbage" * 9, b"garbage" + whole)):
        path = tmp_path / f"{number}.txt.gz"
        path.write_bytes(content)
        bad = BadRows("skip")
        assert load_corpus(path, bad=bad)["text"][:] == GOOD
        assert len(bad.counts) == (number > 0)


def test_a_damaged_row_group_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(damaged_group())
    with pytest.raises(BadRow, match="row 5: broken Parquet file"):
        load_corpus(path)
    bad = BadRows("skip")
    assert load_corpus(path, bad=bad)["text"][:] == [*GOOD[:4], *GOOD[8:]]
    assert bad.as_dict() == {"broken Parquet": {"rows": 4, "first": f"{path}, row 5"}}


def test_nothing_but_bad_rows_is_refused_and_says_what_they_are(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"{\n[]\n\xff\n")
    said = r"no text found, .*3 bad rows are left out: broken JSON: 2 \(first: .*line 1\), not valid UTF-8: 1"
    with pytest.raises(InputError, match=said):
        load_corpus(path, bad=BadRows("skip"))


def test_a_header_that_cannot_be_read_is_refused_whatever_is_done_with_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b"te\xffxt,n\na,b\n")
    with pytest.raises(InputError, match=r"a\.csv: line 1: not valid UTF-8"):
        list(read_rows(path, bad=BadRows("skip")))


def test_a_quote_that_never_closes_takes_no_other_row_with_it(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('text,n\nw1,a\n"w2,b\nw3,c\n"w4\nw5",d\nw6,e\n')
    bad = BadRows("skip")
    assert [row["text"] for _, row in read_rows(path, bad=bad)] == ["w1", "w3", "w4\nw5", "w6"]
    assert [number for number, _ in read_rows(path, bad=BadRows("skip"))] == [2, 4, 5, 7]
    assert bad.as_dict() == {"broken quotes": {"rows": 1, "first": f"{path}, line 3"}}


@pytest.mark.usefixtures("short")
def test_a_quote_that_never_closes_is_given_up_before_the_memory_is_full(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    rows = [f"w{number} and more,a" for number in range(500)]
    path.write_text("\n".join(["text,n", rows[0], '"w1', *rows[2:], ""]))
    bad = BadRows("skip")
    assert [row["text"] for _, row in read_rows(path, bad=bad)] == [row[:-2] for row in (rows[0], *rows[2:])]
    assert bad.as_dict() == {"too long": {"rows": 1, "first": f"{path}, line 3"}}


@pytest.mark.usefixtures("short")
def test_an_array_that_would_fill_the_memory_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"text": "x" * 100}] * 50))
    with pytest.raises(InputError, match=r"a\.json: has 4000 characters or more in one array"):
        list(read_rows(path, bad=BadRows("skip")))


def test_a_damaged_copy_of_a_corpus_is_made_anew(tmp_path: Path, own_cache: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("".join(line + "\n" for line in GOOD))
    load_corpus(path)
    (kept,) = own_cache.rglob("text.arrow")
    content = kept.read_bytes()
    for damaged in (content.replace(b"w3 w4", b"w3 w5"), content[:-100], b""):
        kept.write_bytes(damaged)
        assert load_corpus(path)["text"][:] == GOOD
        assert kept.read_bytes() == content


# ---- tasks


def written(folder: Path, bad: list[str], name: str = "train.jsonl", **keys: object) -> dict[str, object]:
    rows = [json.dumps({"text": text, "label": "ab"[number % 2]}) for number, text in enumerate(GOOD)]
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("\n".join([*rows[:BAD_AT], *bad, *rows[BAD_AT:]]) + "\n")
    return {"train": str(folder / name), "name": "t", **keys}


BAD_EXAMPLES = {
    '{"text": null, "label": "a"}': "empty cell",
    '{"text": "x", "label": NaN}': "empty cell",
    '{"text": ["x"], "label": "a"}': "wrong type",
    '{"text": "x", "label": {}}': "wrong type",
    '{"text": "x"}': "no column 'label'",
    '{"text": "x", "text_pair": "y", "label": "a"}': "column 'text_pair' not in every row",
    '{"text": "x\\u0000", "label": "a"}': NUL,
    '{"text": "x", "label": "a\\ud800"}': NOT_UTF8,
    '{"text": "x", ': "broken JSON",
}


@pytest.mark.parametrize(("row", "kind"), BAD_EXAMPLES.items())
def test_a_bad_example_is_refused_or_left_out(
    row: str, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = written(tmp_path, [row])
    with pytest.raises(BadRow, match=r"train\.jsonl, (row|line) 6: "):
        load_task(spec)
    task = load_task({**spec, "bad_rows": "skip"})
    assert task.splits["train"].texts == GOOD and len(task.splits["train"].labels) == len(GOOD)
    assert {name: told["rows"] for name, told in task.left_out.items()} == {kind: 1}
    assert task.described()["left_out"] == task.left_out
    assert f"notice: t: 1 bad rows are left out: {kind}: 1 (first: {tmp_path}" in capsys.readouterr().out
    assert task.digest == load_task(written(tmp_path, [])).digest


KINDS = {
    "regression": ({"text": "w1", "label": 1.5}, {"text": "w1", "label": "high"}, "wrong type"),
    "tokens": ({"tokens": ["a"], "tags": ["O"]}, {"tokens": ["a", "b"], "tags": ["O"]}, "words and tags do not pair"),
    "choice": (
        {"prompt": "w1", "choices": ["a", "b"], "answer": 1},
        {"prompt": "w1", "choices": ["a", "b"], "answer": 7},
        "no right option",
    ),
    "generation": (
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        {"messages": [{"role": "user", "content": "a"}]},
        "no assistant's message",
    ),
}


@pytest.mark.parametrize(("good", "bad", "kind"), KINDS.values(), ids=KINDS)
def test_what_a_kind_cannot_use_is_a_bad_row_too(good: dict, bad: dict, kind: str, tmp_path: Path) -> None:
    rows = [good, {**good, "tags": ["B-X"]} if "tags" in good else good, bad]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec: dict[str, object] = {"train": str(tmp_path / "train.jsonl")}
    with pytest.raises(BadRow, match=r"row 3: "):
        load_task(spec)
    task = load_task({**spec, "bad_rows": "skip"})
    assert len(task.splits["train"]) == 2 and [*task.left_out] == [kind]


def test_bad_rows_is_one_of_two_words(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="task: bad_rows is 'ignore', expected one of refuse, skip"):
        load_task(written(tmp_path, [], bad_rows="ignore"))
