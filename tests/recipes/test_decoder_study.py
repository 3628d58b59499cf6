"""A study of a decoder: tasks of every kind, and what each language model it makes has forgotten of a text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from decoders import make_decoder
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from worlds import WORDS, make_corpus, make_task, write_config

from recyclable.cli import main
from recyclable.config.run_file import load_config
from recyclable.recipes.study_plan import plan
from recyclable.recipes.study_settings import StudySettings
from recyclable.weights.manifest import DELTA

LENGTH, SEQUENCES = 16, 5


def make_tasks(root: Path) -> dict[str, str]:
    """One that generates, one that chooses and one that classifies."""
    make_task(root / "class", train=24, dev=12, test=12)
    for name in ("say", "pick"):
        (root / name).mkdir()
        for split, count in (("train", 24), ("dev", 6), ("test", 6)):
            rows: list[dict[str, Any]] = []
            for i in range(count):
                asked, right = f"{WORDS[i % 24]} {WORDS[3 * i % 24]}", " " + WORDS[(i + 1) % 24]
                answer = {"response": right} if name == "say" else {"choices": [right, " w30"], "answer": 0}
                rows.append({"prompt": asked, **answer})
            (root / name / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {name: str(root / name) for name in ("say", "pick", "class")}


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished study of one upgrade, full fine-tuning and LoRA; its file."""
    root = tmp_path_factory.mktemp("decoders")
    train = {"max_length": LENGTH, "train_batch_size": 4, "save_every": 0, "learning_rate": 1e-2}
    content = {
        "out": str(root / "study"),
        "bases": {
            "M0": {"path": str(make_decoder(root / "base", "llama"))},
            "M1": {"parent": "M0", "corpus": str(make_corpus(root / "new", seed=6))},
            "M2": {"parent": "M1", "corpus": str(make_corpus(root / "newer", seed=7))},
        },
        "pretrain": {**train, "max_steps": 2},
        "tasks": make_tasks(root),
        "edges": [{"old": "M0", "new": "M1", "tuning": ["full", "lora"]}],
        "seeds": [1],
        "tune": {**train, "max_steps": 2, "eval_every": 1},
        "tune_by_task": {"say": {"max_steps": 3}},
        "texts": {"old": str(make_corpus(root / "old"))},
        "text_settings": {"max_length": LENGTH, "max_sequences": SEQUENCES, "eval_batch_size": 2},
        "experiments": {
            "all": {
                "recycle": {**train, "max_steps": 2, "eval_every": 1},
                "methods": {"apply": {}, "shuffled": {}, "init": {}, "distill": {}},
            }
        },
    }
    file = write_config(root / "study.yaml", content)
    assert main(["study", str(file)]) == 0
    return file


def told(config: StudySettings, cell: str) -> float:
    """What the study says of a cell's loss on the old text."""
    return json.loads((config.out / "texts" / cell / "text_loss.json").read_text())["old"]


def plain_loss(model: Any, folder: Path, corpus: Path, sequences: int = SEQUENCES) -> float:
    """Mean loss per token of the first sequences of a stream of documents, each closed by the end token."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    stream: list[int] = []
    for line in (corpus / "train.txt").read_text().splitlines():
        stream += [*tokenizer(line)["input_ids"], tokenizer.eos_token_id]
    ids = torch.tensor(stream[: LENGTH * sequences]).view(sequences, LENGTH)
    with torch.no_grad():
        return model.eval()(input_ids=ids, labels=ids, use_cache=False).loss.item()


def test_a_bases_loss_is_that_of_plain_transformers(study: Path) -> None:
    config = load_config(StudySettings, study)
    for name, folder in (("M0", study.parent / "base"), ("M1", config.out / "bases" / "M1")):
        plain = plain_loss(AutoModelForCausalLM.from_pretrained(folder), folder, study.parent / "old")
        assert told(config, f"bases/{name}") == pytest.approx(plain, rel=1e-5), name


def test_so_is_that_of_weights_recycled_for_a_task_whose_answers_are_text(study: Path) -> None:
    config = load_config(StudySettings, study)
    new = config.out / "bases" / "M1"
    for cell in ("all/M0-M1/say/full/init/seed1", "all/M0-M1/pick/full/shuffled/seed1"):
        model = AutoModelForCausalLM.from_pretrained(new)
        delta = load_file(config.out / cell / DELTA)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter += delta[name.removeprefix("model.")].float()
        assert told(config, cell) == pytest.approx(plain_loss(model, new, study.parent / "old"), rel=1e-5), cell
    cell = "all/M0-M1/say/lora/init/seed1"
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(new), config.out / cell)
    assert told(config, cell) == pytest.approx(plain_loss(adapted, new, study.parent / "old"), rel=1e-5)


def test_the_report_has_scores_and_what_was_forgotten_beside_each_other(study: Path) -> None:
    config = load_config(StudySettings, study)
    rows = pd.read_csv(config.out / "results.csv").set_index(["task", "experiment", "tuning", "method"])
    for task, score in (("say", "test_exact_match"), ("pick", "test_accuracy_norm"), ("class", "test_f1_macro")):
        of = rows.loc[task]
        assert of[score].between(0, 1).all() and len(of) == 2 + 8
        assert of["loss_old"].isna().all() if task == "class" else of["loss_old"].gt(0).all()
    text = (config.out / "summary.md").read_text()
    assert "## Bases" in text and f"{told(config, 'bases/M2'):.3f}" in text and "loss_old" in text


def test_a_chain_is_of_its_roots_kind_before_its_bases_are_there(study: Path, tmp_path: Path) -> None:
    config = load_config(StudySettings, study).model_copy(update={"out": tmp_path})
    cells = {cell.name: cell for cell in plan(config)}
    assert {cells[f"bases/{name}"].config().lm for name in ("M1", "M2")} == {"causal"}


def test_settings_of_one_task_are_over_those_of_all(study: Path) -> None:
    cells = {cell.name: cell for cell in plan(load_config(StudySettings, study))}
    steps = {task: cells[f"tuned/M0/{task}/full/seed1"].config().max_steps for task in ("say", "pick", "class")}
    assert steps == {"say": 3, "pick": 2, "class": 2}


def test_evaluate_tells_the_same_and_refuses_weights_that_tell_no_text(study: Path, capsys: Any) -> None:
    config, old = load_config(StudySettings, study), str(study.parent / "old")
    cell = "tuned/M0/pick/full/seed1"
    base, corpus = str(study.parent / "base"), ["--corpus", old, "--corpus-length", str(LENGTH)]
    asked = ["evaluate", "--base", base, *corpus, "--json", "--task"]
    assert main([*asked, str(study.parent / "pick"), "--weights", str(config.out / cell)]) == 0
    (row,) = json.loads(capsys.readouterr().out.splitlines()[-1])["runs"]
    tokenizer = AutoTokenizer.from_pretrained(base)
    lines = (study.parent / "old" / "train.txt").read_text().splitlines()
    tokens = sum(len(tokenizer(line)["input_ids"]) + 1 for line in lines)
    model = AutoModelForCausalLM.from_pretrained(base)
    delta = load_file(config.out / cell / DELTA)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter += delta[name.removeprefix("model.")].float()
    plain = plain_loss(model, study.parent / "base", study.parent / "old", min(256, tokens // LENGTH))
    assert row[f"loss of {old}"] == pytest.approx(plain, rel=1e-5)
    weights = str(config.out / "tuned/M0/class/full/seed1")
    assert main([*asked, str(study.parent / "class"), "--weights", weights]) == 2
    assert "has no language-model head" in capsys.readouterr().err
