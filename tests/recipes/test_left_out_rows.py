"""Bad rows that are left out of what a run reads: told once, and recorded with its result."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from verbs import Verbs
from worlds import make_base, make_corpus, make_task

from recyclable.cli import main
from recyclable.weights.lineage import read_lineage
from recyclable.weights.manifest import read_manifest


@pytest.fixture
def verbs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Verbs:
    return Verbs(tmp_path, capsys)


def test_an_upgrade_records_what_was_left_out_of_its_corpora(
    verbs: Verbs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, corpus = make_base(tmp_path / "base"), make_corpus(tmp_path / "corpus", documents=20) / "train.txt"
    whole = corpus.read_bytes()
    corpus.write_bytes(b"a\xe9b\n" + whole + b"c\0d\n\xff\n")
    said = verbs.refused(*verbs.training("pretrain", base=base, corpus={"train": str(corpus)}))
    assert f"{corpus}, line 1: not valid UTF-8 text (byte 0xe9 at character 1), expected UTF-8" in said
    (tmp_path / "old.txt").write_bytes(whole)
    old = {"corpus": {"train": str(tmp_path / "old.txt"), "bad_rows": "skip"}, "share": 0.25}
    asked = verbs.training("pretrain", base=base, corpus={"train": str(corpus), "bad_rows": "skip"}, replay=old)
    assert verbs.run(*asked) == (0, [])
    record = read_lineage(verbs.out)
    assert record is not None
    left_out = {
        "not valid UTF-8": {"rows": 2, "first": f"{corpus}, line 1"},
        "NUL character": {"rows": 1, "first": f"{corpus}, row {len(whole.splitlines()) + 2}"},
    }
    assert record["corpus"]["left_out"] == left_out and record["corpus"]["bad_rows"] == "skip"
    assert "left_out" not in record["replay"]["corpus"]
    assert record["corpus"]["digest"] == record["replay"]["corpus"]["digest"]  # what is left is the same text


def test_tuned_weights_record_what_was_left_out_of_their_task(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    verbs = Verbs(tmp_path, capsys)
    base, task = make_base(tmp_path / "base"), make_task(tmp_path / "task", train=12, dev=6, test=6)
    with (task / "dev.jsonl").open("ab") as file:
        file.write(b'{"text": "\xe9", "label": "left"}\n{"text": 3, "label": "left"}\n')
    spec = {"train": "train.jsonl", "dev": "dev.jsonl", "bad_rows": "skip"}
    (task / "task.yaml").write_text(json.dumps(spec))
    capsys.readouterr()

    status = main(list(map(str, verbs.training("tune", base=base, task=task))))
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("notice: ")]
    kinds = f"not valid UTF-8: 1 (first: {task}/dev.jsonl, line 7), wrong type: 1 (first: {task}/dev.jsonl, row 8)"
    assert (status, said) == (0, [f"notice: task: 2 bad rows are left out: {kinds}"])
    found = read_manifest(verbs.out).task["left_out"]
    assert {kind: told["rows"] for kind, told in found.items()} == {"not valid UTF-8": 1, "wrong type": 1}
