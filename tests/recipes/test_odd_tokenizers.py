"""Tokenizers of files that only their classes know of open wherever bases and weights go."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers_in_python import make_bartpho, make_luke, make_phobert
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from verbs import Verbs

from recyclable.weights.store import VARIABLE


@pytest.mark.parametrize("make_base", [make_phobert, make_bartpho, make_luke])
def test_an_upgrade_and_an_export_read_as_the_tuned_model_did(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, make_base: Any
) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "store"))
    verbs = Verbs(tmp_path, capsys)
    base, tuned, up = make_base(tmp_path / "base"), tmp_path / "tuned", tmp_path / "up"
    own, text = AutoTokenizer.from_pretrained(base), "the aner thing"
    torch.manual_seed(2)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(tuned)
    own.save_pretrained(tuned)
    (tmp_path / "c.txt").write_text("the thing an aner\n" * 600)
    assert verbs.run(*verbs.training("pretrain", lm="masked", base=base, corpus=tmp_path / "c.txt", out=up)) == (0, [])
    assert verbs.run("store", "add", "--tuned", tuned, "--base", base, "--name", "n") == (0, [])
    for on in (base, up):
        out = tmp_path / f"out-{on.name}"
        assert verbs.run("store", "export", "n", "--merged", "--base", on, "--out", out) == (0, [])
        for where in (on, out):
            assert AutoTokenizer.from_pretrained(where)(text).input_ids == own(text).input_ids
