"""Manifests and lineages that the first rule for a config's digest was recorded in are understood in every verb."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from worlds import make_adapter, make_base, make_outdated, make_task, make_upgraded

from recyclable.cli import main
from recyclable.weights.base import Base
from recyclable.weights.fingerprint import Fingerprint, config_digest, fingerprint

OLD = "8a773a4076c6a82bb99ed886a8853daec901ec3a165741d518b0511643de3460"
"""What the first rule made of the config of `worlds.make_base`, as it was recorded when that was the rule."""


def aged(file: Path) -> None:
    """The file as it was written then: chat templates were not digested either."""
    content = json.loads(file.read_text())
    now = list(_fingerprints(content))
    assert now and all(each["config"].startswith("2:") for each in now)
    for each in now:
        each["config"] = OLD
        assert each.pop("chat_template") is None
    file.write_text(json.dumps(content))


def _fingerprints(content: object) -> Iterator[dict[str, str]]:
    if isinstance(content, dict):
        if content.keys() >= {"weights", "tokenizer", "config"}:
            yield content
        content = list(content.values())
    for inner in content if isinstance(content, list) else ():
        yield from _fingerprints(inner)


class World:
    """A base, two upgrades and adapted weights of the base, all recorded by the first rule."""

    def __init__(self, root: Path) -> None:
        self.root, self.task = root, make_task(root / "task")
        self.bases = [make_base(root / "m0")]
        for i in (1, 2):
            self.bases.append(make_upgraded(self.bases[-1], root / f"m{i}", seed=i))
        self.weights = make_outdated(self.bases[0], self.task, root / "weights", scale=0.1)
        self.lora = make_adapter(self.bases[0], self.task, root / "lora", "lora")
        for file in (*root.glob("m*/lineage.json"), *root.glob("*/manifest.json")):
            aged(file)

    def run(self, *command: object) -> None:
        assert main([str(part) for part in command]) == 0


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    before, threads = dict(os.environ), torch.get_num_threads()
    torch.set_num_threads(1)
    yield World(tmp_path_factory.mktemp("old-records"))
    torch.set_num_threads(threads)
    os.environ.clear()
    os.environ.update(before)


def test_a_record_of_the_first_rule_is_the_base_s_own_fingerprint(world: World) -> None:
    base = Base(world.bases[0])
    record = json.loads((world.weights / "manifest.json").read_text())["base"]["fingerprint"]
    assert record["config"] == OLD
    assert Fingerprint.recorded(record, base) == fingerprint(base)
    assert config_digest(base).startswith("2:") and len(config_digest(base)) == 2 + 64


@pytest.mark.parametrize("kind", ["weights", "lora"])
def test_applied_to_their_own_base_and_to_descendants(world: World, kind: str, tmp_path: Path) -> None:
    for i, base in enumerate(world.bases):
        out = tmp_path / f"on-m{i}"
        world.run("apply", "--weights", getattr(world, kind), "--base", base, "--out", out)
        record = json.loads((out / "recycled.json").read_text())
        assert record["weights"][0]["relation"] == ("recorded" if i else "own")
        assert record["base"]["fingerprint"] == fingerprint(Base(base)).as_dict(), "recorded by today's rule"


def test_evaluated_probed_and_kept(world: World, tmp_path: Path) -> None:
    world.run("evaluate", "--weights", world.weights, "--base", world.bases[0], "--task", world.task)
    world.run("probe", "--weights", world.weights, "--base", world.bases[2])
    chosen = ("--store", tmp_path / "store")
    world.run("store", "add", "--tuned", world.weights, "--base", world.bases[0], "--name", "kept", *chosen)
    world.run("store", "export", "kept", "--merged", "--base", world.bases[1], "--out", tmp_path / "merged", *chosen)
    world.run("lineage", "show", world.bases[2])


@pytest.mark.parametrize("method", ["init", "apply"])
def test_recycled_and_what_comes_out_is_recorded_by_todays_rule(world: World, method: str, tmp_path: Path) -> None:
    content = {"method": method, "base": world.bases[1], "old_base": world.bases[0], "weights": world.weights}
    content |= {"task": world.task, "max_length": 24, "out": tmp_path / "out"}
    if method == "init":
        content |= {"max_steps": 2, "train_batch_size": 8, "learning_rate": 1e-4, "eval_every": 2, "save_every": 0}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(content, default=str))))
    world.run("recycle", tmp_path / "run.yaml")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["base"]["fingerprint"] == fingerprint(Base(world.bases[1])).as_dict()
    assert manifest["recycled_from"]["base"]["fingerprint"]["config"] == OLD
    world.run("evaluate", "--weights", tmp_path / "out", "--base", world.bases[1], "--task", world.task)
    world.run("apply", "--weights", tmp_path / "out", "--base", world.bases[2], "--out", tmp_path / "applied")


def test_a_config_that_the_first_rule_tells_apart_is_another_s(world: World, tmp_path: Path, capsys) -> None:
    other = Path(shutil.copytree(world.bases[0], tmp_path / "other"))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "hidden_act": "relu"}))
    command = ["evaluate", "--weights", world.weights, "--base", other, "--task", world.task]
    assert main([str(part) for part in command]) == 2
    assert f"(config {OLD[:12]}), but {other} has config 2:" in capsys.readouterr().err
