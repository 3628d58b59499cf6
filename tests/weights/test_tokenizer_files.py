"""A tokenizer's files by its class: copied, hashed and fetched, whatever they are called; old digests stay known."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path

import huggingface_hub
import pytest
from tokenizers_in_python import make_phobert
from transformers import AutoTokenizer, LukeConfig
from worlds import make_base

from recyclable.errors import InputError
from recyclable.weights.base import Base
from recyclable.weights.fingerprint import Fingerprint, fingerprint, tokenizer_digest
from recyclable.weights.locate import locate
from recyclable.weights.tokenizer_files import tokenizer_files
from recyclable.weights.vocabulary import copy_tokenizer, load_tokenizer

TEXT = "the aner thing"


@pytest.fixture(scope="module")
def phobert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A RoBERTa whose tokenizer is in Python, of vocab.txt and bpe.codes."""
    return make_phobert(tmp_path_factory.mktemp("phobert") / "base")


def test_every_file_that_the_class_reads_is_copied_and_the_copy_reads_alike(phobert: Path, tmp_path: Path) -> None:
    shutil.copyfile(phobert / "config.json", tmp_path / "config.json")
    (phobert / "notes.txt").write_text("no part of it")
    copied = copy_tokenizer(phobert, tmp_path)
    assert set(copied) == {"added_tokens.json", "bpe.codes", "tokenizer_config.json", "vocab.txt"}
    copy, own = (AutoTokenizer.from_pretrained(folder) for folder in (tmp_path, phobert))
    assert copy.tokenize(TEXT) == own.tokenize(TEXT) == ["the", "an@@", "er", "th@@", "ing"]
    assert copy_tokenizer(phobert, tmp_path) == copied


def test_the_class_is_known_by_the_model_s_type_too(tmp_path: Path) -> None:
    LukeConfig().save_pretrained(tmp_path)
    for name in ("entity_vocab.json", "vocab.json", "merges.txt", "dict.txt"):
        (tmp_path / name).write_text("{}")
    assert tokenizer_files(tmp_path) == ["entity_vocab.json", "merges.txt", "vocab.json"]


def test_or_by_a_config_that_lies_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "entity_vocab.json").write_text("{}")
    assert tokenizer_files(tmp_path) == []
    assert tokenizer_files(tmp_path, LukeConfig()) == ["entity_vocab.json"]


def test_templates_go_along_and_directories_of_like_names_do_not(phobert: Path, tmp_path: Path) -> None:
    source, target = Path(shutil.copytree(phobert, tmp_path / "source")), tmp_path / "target"
    target.mkdir()
    (source / "additional_chat_templates").mkdir()
    (source / "tokenizer_of_old").mkdir()
    for name in ("chat_template.jinja", "additional_chat_templates/tools.jinja"):
        (source / name).write_text("{{ messages }}")
    assert {"chat_template.jinja", "additional_chat_templates/tools.jinja"} < set(copy_tokenizer(source, target))
    assert (target / "additional_chat_templates" / "tools.jinja").read_text() == "{{ messages }}"
    assert set(load_tokenizer(source).chat_template) == {"default", "tools"}


def change_codes(folder: Path) -> None:
    (folder / "bpe.codes").write_text((folder / "bpe.codes").read_text().replace("a n 7\n", ""))


def add_a_token(folder: Path) -> None:
    (folder / "added_tokens.json").write_text('{"<mask>": 63, "ring": 64}')


@pytest.mark.parametrize("change", [change_codes, add_a_token])
def test_another_file_of_the_class_is_another_tokenizer(
    phobert: Path, tmp_path: Path, change: Callable[[Path], None]
) -> None:
    other = Path(shutil.copytree(phobert, tmp_path / "other"))
    assert tokenizer_digest(Base(other)) == tokenizer_digest(Base(phobert))
    change(other)
    assert tokenizer_digest(Base(other)) != tokenizer_digest(Base(phobert))


def digest_as_it_was(folder: Path, *files: str) -> str:
    """What the first rule recorded: SHA-256 of the JSON of the digests of the files on a fixed list."""
    of_each = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in files}
    return hashlib.sha256(json.dumps(of_each, sort_keys=True).encode()).hexdigest()


def test_digests_of_common_tokenizers_stay_what_they_were(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", hidden=8, layers=1)
    (base / "added_tokens.json").write_text("{}")
    assert tokenizer_digest(Base(base)) == digest_as_it_was(base, "tokenizer.json")


def test_a_recorded_digest_of_the_first_rule_is_still_that_base_s(phobert: Path) -> None:
    base = Base(phobert)
    own, was = fingerprint(base), digest_as_it_was(phobert, "vocab.txt")
    assert own.tokenizer != was
    assert Fingerprint.recorded({**own.as_dict(), "tokenizer": was}, base) == own
    assert Fingerprint.recorded({**own.as_dict(), "tokenizer": "0" * 64}, base) != own


def test_a_base_of_the_hub_is_fetched_with_what_its_tokenizer_needs(
    phobert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"

    def snapshot_download(name: str, allow_patterns: list[str]) -> str:
        """The files that fit come into the cache, as the hub's client has it."""
        assert name == "someone/phobert"
        cache.mkdir(exist_ok=True)
        for file in phobert.iterdir():
            if any(fnmatch(file.name, pattern) for pattern in allow_patterns):
                shutil.copyfile(file, cache / file.name)
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert locate("someone/phobert") == cache
    assert load_tokenizer(cache).tokenize(TEXT) == load_tokenizer(phobert).tokenize(TEXT)


def test_a_tokenizer_without_a_config_is_read_for_the_config_that_is_given(phobert: Path, tmp_path: Path) -> None:
    copy_tokenizer(phobert, tmp_path)
    config = Base(phobert).config
    assert load_tokenizer(tmp_path, config).tokenize(TEXT) == load_tokenizer(phobert).tokenize(TEXT)
    config.vocab_size = 20
    with pytest.raises(InputError, match="its tokenizer has 64 pieces, but its embedding only 20 rows"):
        load_tokenizer(tmp_path, config)
