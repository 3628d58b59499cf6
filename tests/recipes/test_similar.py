"""Which weights of a store would start a task well, and how alike bases are: on models where the answer is known."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer
from worlds import make_adapter, make_base, make_outdated, make_task, make_tokenizer, make_upgraded, write_config

from recyclable.analysis.similarity import compare
from recyclable.analysis.transferability import logme
from recyclable.cli import main
from recyclable.errors import InputError
from recyclable.recipes.similar import BARE
from recyclable.recipes.similarity import similarity
from recyclable.tasks.parts.fewshot import limit
from recyclable.tasks.parts.task import load_task
from recyclable.weights.store import Store

EXAMPLES = 60


class World:
    """A base, its upgrade, and a store: weights tuned on the task, noise on the old base, an adapter, a stranger's."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.old = make_base(root / "old")
        self.new = make_upgraded(self.old, root / "new")
        self.task = make_task(root / "task", train=200)
        self.stranger = make_base(root / "stranger", seed=9)
        tune = {"base": self.old, "task": self.task, "max_steps": 40, "learning_rate": 1e-2, "train_batch_size": 16}
        config = {**tune, "out": root / "tuned", "max_length": 24, "save_every": 0, "eval_every": 40}
        assert main(["tune", str(write_config(root / "tune.yaml", config))]) == 0
        entries = {
            "tuned": root / "tuned",
            "noise": make_outdated(self.old, self.task, root / "noise", scale=0.5),
            "lora": make_adapter(self.old, self.task, root / "lora", "lora"),
            "strange": make_outdated(self.stranger, self.task, root / "strange"),
        }
        self.store = Store(root / "store")
        for name, folder in entries.items():
            with self.store.adding(name) as aside:
                for file in ("manifest.json", *json.loads((folder / "manifest.json").read_text())["files"]):
                    shutil.copyfile(folder / file, aside / file)

    def similar(self, *options: str) -> int:
        command = ["store", "similar", "--task", self.task, "--base", self.new, "--store", self.store.folder]
        return main([*map(str, command), "--examples", str(EXAMPLES), *options])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("similar"))


def test_weights_tuned_on_the_task_come_first_and_what_does_not_fit_last_with_the_reason(world: World, capsys) -> None:
    assert world.similar("--json") == 0
    said = capsys.readouterr().out.splitlines()
    rows = json.loads(said[-1])["entries"]
    names = [row["name"] for row in rows]
    assert names[0] == "tuned" and names[-1] == "strange"
    assert sorted(names) == sorted([BARE, "tuned", "noise", "lora", "strange"])
    scores = [row["logme"] for row in rows[:-1]]
    assert scores == sorted(scores, reverse=True)
    assert "belongs to base" in rows[-1]["left_out"] and "logme" not in rows[-1]
    assert rows[0]["accuracy"] > dict(zip(names, rows, strict=True))["noise"]["accuracy"]
    assert any(line.startswith("strange: left out: ") for line in said)


def test_the_bare_bases_score_is_that_of_plain_transformers_features(world: World, capsys) -> None:
    assert world.similar("--json") == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["entries"]
    bare = next(row for row in rows if row["name"] == BARE)
    few = limit(load_task(world.task).splits["train"], EXAMPLES, 20)
    model, tokenizer = AutoModel.from_pretrained(world.new).eval(), AutoTokenizer.from_pretrained(world.new)
    features = []
    for text in few.texts:
        with torch.no_grad():
            features.append(model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0).numpy())
    wanted = logme(np.stack(features), np.eye(3)[few.labels])
    assert bare["logme"] == pytest.approx(wanted.logme, abs=1e-3)
    right = wanted.left_out.argmax(1) == np.array(few.labels)
    assert bare["accuracy"] == pytest.approx(right.mean(), abs=1.5 / EXAMPLES)


def test_too_few_examples_are_refused(world: World, capsys) -> None:
    assert world.similar("--examples", "1") == 2
    assert "--examples: found 1, expected at least 2" in capsys.readouterr().err


def test_a_descendant_is_more_alike_than_a_stranger_and_it_is_drawn(world: World, tmp_path: Path) -> None:
    others = {"descendant": str(world.new), "stranger": str(world.stranger)}
    found = similarity(str(world.old), others, str(world.task), examples=20, png=tmp_path / "alike.png")
    assert (tmp_path / "alike.png").stat().st_size > 10_000
    assert found["descendant"].heads.mean() > found["stranger"].heads.mean()
    assert (found["descendant"].cka > found["stranger"].cka).all()
    plain = [
        AutoModel.from_pretrained(f, attn_implementation="eager", add_pooling_layer=False).eval()
        for f in (world.old, world.new)
    ]
    few = limit(load_task(world.task).splits["train"], 20, 20)
    batch = AutoTokenizer.from_pretrained(world.old)(few.texts, padding=True, return_tensors="pt")
    whole = compare(*plain, [batch])
    for name, values in vars(found["descendant"]).items():
        assert np.allclose(values, getattr(whole, name), atol=1e-4), name


def test_bases_of_other_tokenizers_are_refused(world: World, tmp_path: Path) -> None:
    folder = shutil.copytree(world.new, tmp_path / "other")
    make_tokenizer([f"v{i}" for i in range(195)]).save_pretrained(folder)
    with pytest.raises(InputError, match="has another tokenizer than"):
        similarity(str(world.old), {"other": str(folder)}, str(world.task))
