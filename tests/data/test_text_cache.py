"""What is kept of a corpus: found again without reading it, noticed where it is damaged or its files have changed."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest

from recyclable.data import corpus, packing
from recyclable.data.bad_rows import BadRows
from recyclable.data.corpus import find_corpus, load_corpus, pack
from recyclable.data.text_cache import Documents, TextDigest
from recyclable.errors import InputError

TEXTS = [f"w{i} w{i + 1} é w{i + 2}" for i in range(60)]


@pytest.fixture(autouse=True)
def cache(own_cache: Path) -> Path:
    return own_cache


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "a.txt"
    path.write_text("".join(text + "\n" for text in TEXTS))
    return path


def forbidden(*_: Any, **__: Any) -> Any:
    pytest.fail("is not to be read")


def test_the_next_start_reads_neither_files_nor_documents(
    file: Path, cache: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = pack(find_corpus(file), tokenizer, 8)
    (copy,) = cache.rglob("text.arrow")
    copy.unlink()
    monkeypatch.setattr(corpus, "read_rows", forbidden)
    monkeypatch.setattr(packing, "tokenised", forbidden)
    monkeypatch.setattr(datasets.Dataset, "from_file", forbidden)
    again = pack(find_corpus(file), tokenizer, 8)
    assert again.digest == first.digest and [*again[0]] == [*first[0]]


def test_a_file_that_is_touched_is_read_again_and_its_packed_corpus_found(
    file: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = pack(find_corpus(file), tokenizer, 8)
    time.sleep(0.02)
    os.utime(file)
    read = []
    original = corpus.read_rows
    monkeypatch.setattr(corpus, "read_rows", lambda *given: (read.append(given[0]), original(*given))[1])
    monkeypatch.setattr(packing, "tokenised", forbidden)
    assert pack(find_corpus(file), tokenizer, 8).digest == first.digest
    assert read == [file]


def test_a_file_replaced_by_one_of_the_same_size_and_time_is_read(file: Path, tokenizer: Any, tmp_path: Path) -> None:
    stat, first = file.stat(), pack(find_corpus(file), tokenizer, 8)
    (other := tmp_path / "other").write_text(file.read_text().replace("w3 ", "w4 "))
    os.utime(other, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    other.replace(file)
    assert file.stat().st_size == stat.st_size and file.stat().st_mtime_ns == stat.st_mtime_ns
    assert pack(find_corpus(file), tokenizer, 8).digest != first.digest


@pytest.mark.parametrize(("ctime", "waits"), [(0.005, 0.015), (0.5, 0), (1e9, 0), (-60.0, 0)])
def test_no_file_is_read_within_a_tick_of_its_change(
    file: Path, monkeypatch: pytest.MonkeyPatch, ctime: float, waits: float
) -> None:
    waited: list[float] = []
    changed = file.stat().st_ctime
    monkeypatch.setattr(corpus.time, "time", lambda: changed + ctime)
    monkeypatch.setattr(corpus.time, "sleep", waited.append)
    corpus._state(file)
    assert waited == pytest.approx([waits] if waits else [], abs=1e-3)


def test_a_file_system_that_knows_seconds_alone_is_waited_for_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    class Coarse:
        def stat(self) -> os.stat_result:
            return os.stat_result((0,) * 7 + (1000, 1000, 1000, 1000.0, 1000.0, 1000.0, *[1000 * 10**9] * 3))

    waited: list[float] = []
    monkeypatch.setattr(corpus.time, "time", lambda: 1000.5)
    monkeypatch.setattr(corpus.time, "sleep", waited.append)
    corpus._state(Coarse())  # type: ignore[arg-type]
    assert waited == [1.5]


@pytest.mark.parametrize("name", ["text.arrow", "meta.json"])
def test_a_flipped_bit_is_noticed_before_anything_is_made_of_it(
    file: Path, cache: Path, tokenizer: Any, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = [*pack(datasets.Dataset.from_dict({"text": TEXTS}), tokenizer, 9, cache_dir=cache / "expected")[3]]
    find_corpus(file)
    (kept,) = (path for path in cache.rglob(name) if path.parent.parent.name == "recyclable_text")
    whole = kept.read_bytes()
    for place in (len(whole) // 3, len(whole) // 2, len(whole) - 30):
        kept.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert load_corpus(file)["text"][:] == TEXTS
        assert "damaged" in capsys.readouterr().out
        assert kept.read_bytes() == whole
    kept.write_bytes(whole[:-1])
    assert [*pack(find_corpus(file), tokenizer, 9)[3]] == expected


def test_a_corpus_that_changes_under_the_hands_of_a_run_is_an_error(file: Path, cache: Path, tokenizer: Any) -> None:
    found = find_corpus(file)
    (kept,) = cache.rglob("text.arrow")
    kept.unlink()
    file.write_text("something else\n" * 100)
    with pytest.raises(InputError, match="was changed while it was read"):
        pack(found, tokenizer, 8)


def test_what_is_left_out_of_two_corpora_is_told_alike_at_every_start(tmp_path: Path) -> None:
    told = []
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text('{"text": "one"}\n{"text": 1}\n')
    for _ in range(2):
        bad = BadRows("skip")
        for name in ("a", "b"):
            find_corpus(tmp_path / f"{name}.jsonl", bad=bad)
        told.append(bad.as_dict())
    assert told[0] == told[1] and sum(count["rows"] for count in told[0].values()) == 2


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
@pytest.mark.parametrize("sizes", [[60], [1, 20, 0, 39], [30, 30]])
def test_a_digest_is_of_the_documents_however_they_come(file: Path, kind: pa.DataType, sizes: list[int]) -> None:
    digest, begin = TextDigest(), 0
    for size in sizes:
        digest.update(pa.array(["before", *TEXTS[begin : begin + size], "after"], kind).slice(1, size))
        begin += size
    assert digest.hexdigest() == find_corpus(file).digest
    assert digest.hexdigest() == Documents.of(datasets.Dataset.from_dict({"text": TEXTS})).digest


@pytest.mark.parametrize("other", [["ab", "c"], ["a", "bc", ""], ["", "a", "bc"], ["a", "bd"], ["a"], []])
def test_other_documents_have_another_digest(other: list[str]) -> None:
    digests = []
    for texts in (["a", "bc"], other):
        digest = TextDigest()
        digest.update(pa.array(texts, pa.string()))
        digests.append(digest.hexdigest())
    assert digests[0] != digests[1]
