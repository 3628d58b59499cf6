"""`recyclable evaluate`: a base alone is scored too; what cannot be drawn or told is said before anything is scored."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from answers import log_likelihood, make_answers_task, rows_of
from decoders import END, make_decoder
from transformers import AutoModelForCausalLM, AutoTokenizer
from worlds import make_base, make_outdated, make_task

from recyclable.cli import main


def test_a_plot_is_refused_before_scoring_and_drawn_behind_the_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    base, task = make_base(tmp_path / "base"), make_task(tmp_path / "task", train=9, dev=9, test=9)
    weights = make_outdated(base, task, tmp_path / "weights")
    manifest = json.loads((weights / "manifest.json").read_text())
    manifest["metrics"]["metric"], manifest["history"] = "accuracy", [{"step": 0}]
    (weights / "manifest.json").write_text(json.dumps(manifest))
    command = ["evaluate", "--weights", str(weights), "--base", str(base), "--task", str(task), "--plot"]
    for place in ("/nope/x.png", str(tmp_path / "x.foo")):
        with monkeypatch.context() as patch:
            patch.setattr("recyclable.recipes.evaluate.evaluate", lambda *_, **__: pytest.fail("scored"))
            assert main([*command, place]) == 2
        said = capsys.readouterr()
        assert said.out == "" and said.err.startswith("recyclable: error: --plot: ") and said.err.count("\n") == 1
    assert main([*command, str(tmp_path / "x.png")]) == 0
    assert "test_accuracy" in capsys.readouterr().out
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_a_base_alone_is_scored_on_answers_in_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, task = make_decoder(tmp_path / "base", "llama"), make_answers_task(tmp_path / "task")
    assert main(["evaluate", "--base", str(base), "--task", str(task), "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out.splitlines()[-1])["runs"]
    tokenizer, model = AutoTokenizer.from_pretrained(base), AutoModelForCausalLM.from_pretrained(base).eval()
    rows = {split: rows_of(task / f"{split}.jsonl") for split in ("train", "test")}
    most, same = max(len(tokenizer(row["response"])["input_ids"]) + 1 for row in rows["train"]), 0
    for row in rows["test"]:
        ids = torch.tensor([tokenizer(row["prompt"])["input_ids"]])
        said = model.generate(ids, max_new_tokens=most, do_sample=False, eos_token_id=END)[0, ids.shape[1] :]
        same += tokenizer.decode(said, skip_special_tokens=True).strip() == row["response"].strip()
    assert (found["weights"], found["method"]) == (str(base), "base")
    assert found["test_log_likelihood"] == pytest.approx(log_likelihood(model, tokenizer, rows["test"]), abs=1e-5)
    assert found["test_exact_match"] == same / len(rows["test"])


def test_a_base_alone_has_no_head_for_classes_and_no_curve(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, task = make_decoder(tmp_path / "base", "llama"), make_task(tmp_path / "task", train=9, dev=9, test=9)
    assert main(["evaluate", "--base", str(base), "--task", str(task)]) == 2
    assert "recyclable: error: weights: none given, but task is for " in capsys.readouterr().err
    assert main(["evaluate", "--base", str(base), "--task", str(task), "--plot", str(tmp_path / "x.png")]) == 2
    assert "--plot: draws the dev curves of --weights" in capsys.readouterr().err


@pytest.mark.parametrize("corpus", ["there", "missing"])
def test_what_text_is_asked_of_is_looked_at_before_anything_is_scored(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, corpus: str
) -> None:
    monkeypatch.setattr("recyclable.recipes.evaluate.evaluate", lambda *_, **__: pytest.fail("scored"))
    if corpus == "there":
        base = make_base(tmp_path / "base")
        weights = ["--weights", str(make_outdated(base, make_task(tmp_path / "task", train=9), tmp_path / "weights"))]
        (tmp_path / "there").write_text("a few words\n" * 90)
    else:
        base, weights = make_decoder(tmp_path / "base", "llama"), []
        make_answers_task(tmp_path / "task")
    argv = ["evaluate", *weights, "--base", str(base), "--task", str(tmp_path / "task")]
    assert main([*argv, "--corpus", str(tmp_path / corpus), "--corpus-length", "16"]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1
    assert ("has no language-model head" if corpus == "there" else str(tmp_path / "missing")) in said.err
