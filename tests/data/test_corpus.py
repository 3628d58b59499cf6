"""Loading and packing unlabelled text: every format, every mistake, the cache."""

from __future__ import annotations

import gzip
import io
import os
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rows import write_rows
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from recyclable.data.corpus import load_corpus, pack
from recyclable.data.layout import streamed
from recyclable.errors import InputError, RunError

pytestmark = pytest.mark.usefixtures("own_cache")
TEXTS = ["a b c", "d e, “f”", "g h"]
ROWS = [{"text": text, "id": i} for i, text in enumerate(TEXTS)]
FORMATS = ["txt", "jsonl", "json", "csv", "tsv"]


def corpus(texts: list[str]) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"text": texts})


def flipped(content: bytes, begin: int) -> bytes:
    """Eight bytes with every bit turned."""
    return content[:begin] + bytes(255 - byte for byte in content[begin : begin + 8]) + content[begin + 8 :]


def in_parquet(texts: list[str]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"text": texts}), buffer, compression="snappy")
    return buffer.getvalue()


# loading


@pytest.mark.parametrize("suffix", [*FORMATS, *(f"{suffix}.gz" for suffix in FORMATS), "parquet"])
def test_every_format_gives_the_same_documents(suffix: str, tmp_path: Path) -> None:
    path = write_rows(tmp_path / f"docs.{suffix}", ROWS)
    dataset = load_corpus(str(path))
    assert dataset.column_names == ["text"]
    assert dataset["text"][:] == TEXTS


def test_json_may_also_hold_an_object_per_line(tmp_path: Path) -> None:
    write_rows(tmp_path / "docs.jsonl", ROWS).rename(tmp_path / "docs.json")
    assert load_corpus(tmp_path / "docs.json")["text"][:] == TEXTS


def test_a_directory_gives_the_files_of_the_split(tmp_path: Path) -> None:
    write_rows(tmp_path / "train.jsonl.gz", ROWS)
    write_rows(tmp_path / "heldout.txt", [{"text": "held out"}])
    assert load_corpus(str(tmp_path))["text"][:] == TEXTS
    assert load_corpus(str(tmp_path), split="heldout")["text"][:] == ["held out"]


def test_a_glob_and_a_list_join_files_of_different_formats(tmp_path: Path) -> None:
    one = write_rows(tmp_path / "part1.txt", ROWS[:2])
    two = write_rows(tmp_path / "part2.parquet", ROWS[2:])
    assert load_corpus(str(tmp_path / "part*"))["text"][:] == TEXTS
    assert load_corpus([str(two), str(one)])["text"][:] == [TEXTS[2], *TEXTS[:2]]


def test_another_text_column_comes_out_as_text(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "docs.jsonl", [{"body": "a b", "text": "c"}])
    assert load_corpus(str(path))["text"][:] == ["c"]
    assert load_corpus(str(path), text_column="body")["text"][:] == ["a b"]


def test_blank_and_null_documents_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\n  \t\ntwo")
    (tmp_path / "b.jsonl").write_text('{"text": null}\n\n{"text": " "}\n{"text": "three"}\n')
    assert load_corpus([str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl")])["text"][:] == ["one", "two", "three"]


def test_only_a_line_feed_ends_a_document_and_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffone\u2028still one\x0cand here\r\ntwo\n".encode())
    assert load_corpus(str(tmp_path / "a.txt"))["text"][:] == ["one\u2028still one\x0cand here", "two"]


def test_a_changed_file_of_the_same_size_is_read_anew(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old text\n")
    assert load_corpus(str(path))["text"][:] == ["old text"]
    stat = path.stat()
    path.write_text("new text\n")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert load_corpus(str(path))["text"][:] == ["new text"]


def test_an_unchanged_file_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("one\n")
    first = load_corpus(str(tmp_path / "a.txt"))
    monkeypatch.setattr("recyclable.data.corpus.read_rows", lambda *_: pytest.fail("read again"))
    assert load_corpus(str(tmp_path / "a.txt")).cache_files == first.cache_files


def test_a_file_that_was_broken_loads_once_it_is_mended(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n{"text"')
    with pytest.raises(InputError):
        load_corpus(str(path))
    path.write_text('{"text": "one"}\n')
    assert len(load_corpus(str(path))) == 1


def test_loading_leaves_the_progress_bar_setting_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n")
    before = datasets.are_progress_bars_disabled()
    load_corpus(str(tmp_path / "a.txt"))
    assert datasets.are_progress_bars_disabled() == before


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", r"a\.txt: no text found"),
        ("a.txt", b" \n\t\n\n", r"a\.txt: no text found"),
        ("a.jsonl", b'{"text": ""}\n', r"a\.jsonl: no text found"),
        ("a.csv", b"", r"a\.csv: no text found"),
        ("a.jsonl", b'{"body": "x", "id": 1}\n', r"a\.jsonl, row 1: no column 'text', found \['body', 'id'\]"),
        ("a.csv", b"id,body\n1,x\n", r"a\.csv, row 2: no column 'text', found \['body', 'id'\]"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "y"\n', r"a\.jsonl, line 2: broken JSON"),
        ("a.jsonl", b'{"text": "x"}\n["y"]\n', r"a\.jsonl, line 2: found JSON list, expected an object"),
        ("a.json", b'[{"text": "x"},\n {"text": }]', r"a\.json, line 2: broken JSON"),
        ("a.json", b'["x"]', r"a\.json, item 1: found JSON str, expected an object"),
        ("a.jsonl", b'{"text": 3}\n', r"a\.jsonl, row 1: column 'text' is 3, expected a string"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', r"a\.jsonl, row 1: column 'text' is not valid UTF-8"),
        ("a.csv", b"text,id\nx,1\ny\n", r"a\.csv, line 3: found 1 cells, expected 2"),
        ("a.csv", b'text,id\n"x,1\n', r"a\.csv, line 2: a cell opens here with a quote"),
        ("a.csv", b"text,text\nx,y\n", r"a\.csv: a column name appears twice"),
        ("a.txt", b"caf\xe9\n", r"a\.txt, line 1: not valid UTF-8"),
        ("a.txt.gz", b"plain", r"a\.txt\.gz: broken gzip"),
        ("a.txt.gz", gzip.compress(b"some text " * 99, mtime=0)[:20], r"a\.txt\.gz: broken gzip"),
        ("a.parquet", b"plain", r"a\.parquet: broken Parquet"),
        ("a.txt.gz", flipped(gzip.compress(b"some text " * 99, mtime=0), 15), r"a\.txt\.gz: broken gzip"),
        ("a.parquet", flipped(in_parquet(TEXTS), 30), r"a\.parquet, row 1: broken Parquet"),
        ("a.jsonl", b'{"text": "x"}\n' + b"[" * 100_000, r"a\.jsonl, line 2: broken JSON"),
        ("a.json", b"[" * 100_000, r"a\.json: broken JSON"),
        ("a.jsonl", b'{"text": "x", "id": ' + b"1" * 5000 + b"}", r"a\.jsonl, line 1: broken JSON"),
        ("a.json", b'[{"text": "x", "id": ' + b"1" * 5000 + b"}]", r"a\.json: broken JSON"),
        ("a.json", b'["caf\xe9"]', r"a\.json, item 1: not valid UTF-8"),
        ("a.pdf", b"x", r"a\.pdf: unsupported extension, expected one of \.txt"),
    ],
)
def test_a_bad_file_is_an_input_error(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        load_corpus(str(tmp_path / name))


def test_a_parquet_file_without_the_column_lists_what_it_has(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.parquet", ROWS)
    with pytest.raises(InputError, match=r"no column 'body', found \['id', 'text'\]"):
        load_corpus(str(path), text_column="body")


@pytest.mark.parametrize("name", ["none.txt", "none.jsonl.gz", "none", "none/deeper/docs"])
def test_a_missing_path_is_an_input_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=f"{name}: no such file or directory"):
        load_corpus(str(tmp_path / name))


def test_several_files_without_any_text_are_named_together(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("\n")
    with pytest.raises(InputError, match=r"a\.txt, .*b\.txt: no text found"):
        load_corpus(str(tmp_path / "*.txt"))


def test_a_relative_path_whose_folder_exists_is_not_sought_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "corpora").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="corpora/bio: no such file or directory"):
        load_corpus("corpora/bio")


def test_other_sources_with_nothing_in_them_are_input_errors(tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text("x")
    with pytest.raises(InputError, match=r"no file named train\.\*, found \['other.txt'\]"):
        load_corpus(str(tmp_path))
    with pytest.raises(InputError, match=r"\*\.csv: no file matches"):
        load_corpus(str(tmp_path / "*.csv"))
    with pytest.raises(InputError, match="an empty list"):
        load_corpus([])
    with pytest.raises(InputError, match=r"none\.txt: no such file"):
        load_corpus([str(tmp_path / "other.txt"), str(tmp_path / "none.txt")])


def test_a_hub_name_that_cannot_be_fetched_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach 'some/corpus' on the Hub\nmore")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(InputError, match=r"some/corpus:en: no such path .* hub .*ConnectionError: Couldn't reach"):
        load_corpus("some/corpus:en")


def test_a_hub_data_set_is_loaded_by_name_config_split_and_column(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = datasets.DatasetDict({"test": datasets.Dataset.from_dict({"body": ["x", " ", None, "y"], "n": [1, 2, 3, 4]})})
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **_: asked.append(args) or hub)
    assert load_corpus("some/corpus:en", text_column="body", split="test")["text"][:] == ["x", "y"]
    assert asked == [("some/corpus", "en")]
    with pytest.raises(InputError, match=r"some/corpus: no split 'train', found \['test'\]"):
        load_corpus("some/corpus")
    with pytest.raises(InputError, match=r"some/corpus: no column 'text', found \['body', 'n'\]"):
        load_corpus("some/corpus", split="test")
    with pytest.raises(InputError, match=r"column 'n' holds Value\('int64'\), expected strings"):
        load_corpus("some/corpus", split="test", text_column="n")


# packing


def test_packing_joins_documents_with_sep_and_wraps_each_piece(tokenizer) -> None:
    packed = pack(corpus(["a b c d", "e f", "g h i"]), tokenizer, 6)
    # stream: a b c d [SEP] e f [SEP] g h i, cut into pieces of 4; "g h i" is incomplete and dropped
    a = 5
    expected = [[2, a, a + 1, a + 2, a + 3, 3], [2, 3, a + 4, a + 5, 3, 3]]
    assert [packed[i].tolist() for i in range(len(packed))] == expected
    assert packed[0].dtype == np.int64 and packed[0].shape == (6,)
    assert packed.tokens == 6
    assert packed.seq_len == 6


def test_a_tokenizer_without_special_tokens_gives_a_plain_cut(tokenizer_factory) -> None:
    packed = pack(corpus(["a b", "c d e"]), tokenizer_factory(bert=False), 2)
    assert [packed[i].tolist() for i in range(len(packed))] == [[5, 6], [7, 8]]
    assert packed.tokens == 4


def test_bos_and_eos_stand_in_for_cls_and_sep(tokenizer_factory) -> None:
    tokenizer = tokenizer_factory(bert=False)
    tokenizer.bos_token, tokenizer.eos_token = "[CLS]", "[SEP]"
    assert pack(corpus(["a", "b"]), tokenizer, 5)[0].tolist() == [2, 5, 3, 6, 3]


def test_a_stream_over_many_batches_loses_nothing(tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    texts = [" ".join(f"w{j}" for j in rng.integers(100, size=rng.integers(1, 9))) for _ in range(50)]
    whole = pack(corpus(texts), tokenizer, 7)
    monkeypatch.setattr("recyclable.data.packing._TOKENS", 3)
    parts = pack(corpus(texts), tokenizer, 7, cache_dir=Path(datasets.config.HF_DATASETS_CACHE) / "other")
    stream = []
    for text in texts:
        stream += [3] * bool(stream) + [31 + int(word[1:]) for word in text.split()]
    assert np.concatenate([parts[i][1:-1] for i in range(len(parts))]).tolist() == stream[: len(stream) // 5 * 5]
    assert (whole.digest, whole.tokens) == (parts.digest, parts.tokens)
    assert whole.tokens == sum(token != 3 for token in stream[: len(stream) // 5 * 5])


def test_the_second_call_does_not_tokenise(tmp_path: Path, tokenizer, tokenizer_factory) -> None:
    path = tmp_path / "a.txt"
    path.write_text("a b c d e f\n")
    first = pack(load_corpus(str(path)), tokenizer, 5)
    calls = tokenizer.calls
    assert calls > 0
    os.utime(path)  # touched, but the same text
    tokenizer("a b c", padding="max_length", truncation=True, max_length=8)  # leaves its mark on the backend
    second = pack(load_corpus(str(path)), tokenizer, 5)
    assert tokenizer.calls == calls + 1
    assert (second.digest, second[0].tolist()) == (first.digest, first[0].tolist())
    fresh = tokenizer_factory()
    assert pack(load_corpus(str(path)), fresh, 5).digest == first.digest and fresh.calls == 0


def test_other_text_tokenizer_or_length_does_not_hit_the_cache(tokenizer, tokenizer_factory) -> None:
    texts = ["a b c d e f"]
    first = pack(corpus(texts), tokenizer, 5)
    same_size = tokenizer_factory([*"bacdefghijklmnopqrstuvwxyz", *(f"w{i}" for i in range(100))])
    assert len(same_size) == len(tokenizer)
    assert pack(corpus(texts), same_size, 5)[0].tolist() == [2, 6, 5, 7, 3]
    assert first[0].tolist() == [2, 5, 6, 7, 3]
    assert pack(corpus(texts), tokenizer, 4)[0].tolist() == [2, 5, 6, 3]
    assert pack(corpus(["a a a"]), tokenizer, 5)[0].tolist() == [2, 5, 5, 5, 3]


def test_a_tokenizer_written_in_python_is_told_apart_by_its_files(own_cache: Path) -> None:
    texts = corpus(["abcdef"])
    first = pack(texts, ByT5Tokenizer(), 4)
    assert pack(texts, ByT5Tokenizer(), 4).digest == first.digest
    assert len(list((own_cache / "recyclable_packed").iterdir())) == 1
    pack(texts, ByT5Tokenizer(additional_special_tokens=["abc"], extra_ids=0), 4)
    assert len(list((own_cache / "recyclable_packed").iterdir())) == 2


def test_where_one_document_ends_matters_to_the_cache(tokenizer) -> None:
    assert pack(corpus(["a b", " c d"]), tokenizer, 5)[0].tolist() == [2, 5, 6, 3, 3]
    assert pack(corpus(["a b c d"]), tokenizer, 5)[0].tolist() == [2, 5, 6, 7, 3]


def test_the_digest_tells_sequences_apart_and_nothing_else(tokenizer) -> None:
    digest = pack(corpus(["a b c"]), tokenizer, 5).digest
    assert len(digest) == 64
    assert pack(corpus(["a b c d"]), tokenizer, 5).digest == digest  # d is in the dropped piece
    assert pack(corpus(["a b d"]), tokenizer, 5).digest != digest
    assert pack(corpus(["a b c"]), tokenizer, 4).digest != digest


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("ids.bin", lambda data: data[:-2]),
        ("ids.bin", lambda data: bytes(len(data))),
        ("ids.bin", lambda data: bytes([data[0] ^ 1]) + data[1:]),
        ("starts.bin", lambda data: data[:-1] + bytes([1 - data[-1]])),
        ("starts.bin", None),
        ("meta.json", lambda data: data.replace(b'"tokens": 6', b'"tokens": 7')),
        ("meta.json", lambda data: data.replace(b'"digest": "', b'"digest": "0')),
        ("meta.json", lambda data: b"{"),
    ],
)
def test_a_damaged_cache_is_told_and_written_anew(
    tokenizer, own_cache: Path, capsys: pytest.CaptureFixture, file: str, damage: Callable[[bytes], bytes] | None
) -> None:
    first = pack(corpus(["a b c d e f"]), tokenizer, 5)
    assert pack(corpus(["a b c d e f"]), tokenizer, 5).digest == first.digest
    assert capsys.readouterr().out == ""
    (path,) = own_cache.rglob(file)
    if damage is None:
        path.unlink()
    else:
        before = path.read_bytes()
        path.write_bytes(damage(before))
        assert path.read_bytes() != before
    again = pack(corpus(["a b c d e f"]), tokenizer, 5)
    assert f"notice: a packed corpus is damaged and is made anew: {path}: " in capsys.readouterr().out
    assert (again.digest, again.tokens) == (first.digest, 6)
    assert [row.tolist() for row in (again[0], again[1])] == [[2, 5, 6, 7, 3], [2, 8, 9, 10, 3]]


def test_what_another_process_has_verified_is_opened_without_reading_it_unless_its_size_is_wrong(
    tokenizer, own_cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    first = pack(corpus(["a b c d e f"]), tokenizer, 5)
    with monkeypatch.context() as patch:
        patch.setattr("recyclable.data.packed.blake3_file", lambda path: pytest.fail(f"{path} is read"))
        assert pack(corpus(["a b c d e f"]), tokenizer, 5, verified=True).digest == first.digest
    (path,) = own_cache.rglob("ids.bin")
    os.truncate(path, 18)
    assert [*pack(corpus(["a b c d e f"]), tokenizer, 5, verified=True)[1]] == [2, 8, 9, 10, 3]
    assert f"damaged and is made anew: {path}: has 18 bytes, expected 20" in capsys.readouterr().out


def test_a_file_that_is_cut_short_under_a_run_is_an_error_and_no_bus_error(tokenizer, own_cache: Path) -> None:
    packed = pack(corpus(["a b c d e f"]), tokenizer, 5)
    packed[0], packed.documents(0)
    for path in own_cache.rglob("*.bin"):
        os.truncate(path, 7)
    with pytest.raises(RunError, match=r"ids\.bin: ends before sequence 1: it was cut short after it was opened$"):
        packed[1]
    with pytest.raises(RunError, match=r"starts\.bin: ends before sequence 1"):
        packed.documents(1)


def test_ranks_that_pack_at_once_get_the_same_and_leave_nothing_behind(tokenizer_factory, own_cache: Path) -> None:
    tokenizers = [tokenizer_factory() for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda t: pack(corpus(["a b c d"] * 3000), t, 16), tokenizers))
    assert len({packed.digest for packed in results}) == 1
    assert results[0][0].tolist() == results[3][0].tolist()
    assert len(list((own_cache / "recyclable_packed").iterdir())) == 1


def test_a_packed_corpus_travels_to_workers_as_a_path(tokenizer) -> None:
    packed = pack(corpus(["a b c d"] * 2000), tokenizer, 12)
    packed[0]
    data = pickle.dumps(packed)
    assert len(data) < 1000
    assert pickle.loads(data)[3].tolist() == packed[3].tolist()
    with pytest.raises(IndexError):
        packed[len(packed)]


def test_too_few_tokens_for_one_sequence_is_an_input_error(tokenizer, own_cache: Path) -> None:
    with pytest.raises(InputError, match="corpus: it has 3 tokens, fewer than one sequence of 6"):
        pack(corpus(["a b c"]), tokenizer, 6)
    assert list((own_cache / "recyclable_packed").iterdir()) == []


def test_text_that_the_tokenizer_makes_nothing_of_is_an_input_error(own_cache: Path) -> None:
    pieces = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE({"</s>": 0, "a": 1}, [])), eos_token="</s>")
    with pytest.raises(InputError, match="corpus: the tokenizer makes no token of its text"):
        pack(corpus(["b c"] * 9), pieces, 4, streamed(pieces))
    assert list((own_cache / "recyclable_packed").iterdir()) == []
    assert pack(corpus(["b a"] * 9), pieces, 4, streamed(pieces)).tokens == 8


def test_a_length_without_room_for_text_is_an_input_error(tokenizer) -> None:
    with pytest.raises(InputError, match="max_length: 2 leaves no room for text, expected at least 3"):
        pack(corpus(["a b c"]), tokenizer, 2)


def test_a_real_corpus_loads_and_packs(real_data: Path, tokenizer) -> None:
    dataset = load_corpus(str(real_data / "corpora" / "general"), split="heldout")
    packed = pack(dataset, tokenizer, 128)
    assert len(dataset) > 100
    assert len(packed) * 126 >= packed.tokens > len(packed) * 120
