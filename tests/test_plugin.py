"""Plug-ins: what a package installed beside this one brings is listed and used by its name, the example first."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from processes import ROOT
from safetensors.torch import load_file
from worlds import make_base, make_corpus, make_outdated, make_task, make_upgraded, rewrite_rows

PLUGIN = ROOT / "docs" / "plugin"
RUN = {"max_steps": 1, "train_batch_size": 8, "learning_rate": 1e-9, "max_length": 24, "save_every": 0}
KINDS = """
    from dataclasses import replace
    from typing import ClassVar, Literal

    from recyclable.lm.masked import Masked
    from recyclable.tasks.regression import Regression

    class Stars(Regression):
        "As many stars as a text is worth."

        name: ClassVar[str] = "stars"

        def claims(self, train):
            return 3 if all(set(label) == {"*"} for label in train.labels) else 0

        def read(self, given, raws):
            counted = {split: replace(raw, labels=[len(label) for label in raw.labels]) for split, raw in raws.items()}
            return super().read(given, counted)

    class HalfHidden(Masked):
        "Every other token is hidden."

        lm: Literal["half_hidden"] = "half_hidden"
        mlm_probability: Literal[0.5] = 0.5
"""
POINTS = "[recyclable.tasks]\nstars = kinds:Stars\n\n[recyclable.lm]\nhalf_hidden = kinds:HalfHidden\n"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the plug-in is installed: a folder of its own on the path, as a package of its name."""
    folder = tmp_path_factory.mktemp("plugin")
    source = folder / "source"
    source.mkdir()
    for file in PLUGIN.iterdir():
        if file.is_file():
            (source / file.name).write_bytes(file.read_bytes())
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "-w", str(folder), str(source)]
    subprocess.run([*pip, *build], check=True, timeout=300)
    (wheel,) = folder.glob("*.whl")
    subprocess.run(
        [*pip, "install", "--no-deps", "--target", str(folder / "site"), str(wheel)], check=True, timeout=300
    )
    return folder / "site"


def recyclable(*arguments: object, path: Path | None, cwd: Path) -> subprocess.CompletedProcess:
    python_path = os.pathsep.join(str(each) for each in (ROOT, path) if each)
    environment = {**os.environ, "PYTHONPATH": python_path, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "recyclable.cli", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600)


def listed(path: Path | None, cwd: Path, what: str = "methods") -> dict[str, dict]:
    done = recyclable(what, "--json", path=path, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return {one["name"]: one for one in json.loads(done.stdout.splitlines()[-1])[what]}


def distribution(folder: Path, name: str, points: str, source: str = "") -> Path:
    """A folder for the path with what pip would leave there of a package with these entry points and one module."""
    information = folder / f"{name}-1.dist-info"
    information.mkdir(parents=True)
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
    (information / "entry_points.txt").write_text(points)
    (folder / f"{name}.py").write_text(source)
    return folder


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a package is installed that brings a kind of task and a kind of language model."""
    return distribution(tmp_path_factory.mktemp("kinds"), "kinds", POINTS, textwrap.dedent(KINDS))


def test_the_example_is_one_class_and_packaging_in_under_60_lines() -> None:
    assert sum(len(file.read_text().splitlines()) for file in PLUGIN.iterdir() if file.is_file()) < 60


def test_an_installed_method_is_listed_with_its_settings_and_where_it_comes_from(
    installed: Path, tmp_path: Path
) -> None:
    with_it, without = listed(installed, tmp_path), listed(None, tmp_path)
    assert with_it.keys() - without.keys() == {"random_start"}
    assert with_it["random_start"]["from"] == "recyclable-random-start" and with_it["init"]["from"] == "recyclable"
    settings = {one["name"]: one for one in with_it["random_start"]["settings"]}
    assert settings["scale"]["default"] == 1.0 and settings["learning_rate"]["required"]


def test_an_installed_method_is_used_by_its_name_and_recycles(installed: Path, tmp_path: Path) -> None:
    base, task = make_base(tmp_path / "base"), make_task(tmp_path / "task")
    make_upgraded(base, tmp_path / "upgraded")
    outdated = make_outdated(base, task, tmp_path / "tuned")
    content = {"method": "random_start", "base": "upgraded", "old_base": "base", "weights": "tuned", "task": "task"}
    (tmp_path / "run.yaml").write_text(json.dumps({**content, **RUN, "out": "out"}))
    refused = recyclable("recycle", "run.yaml", path=None, cwd=tmp_path)
    assert refused.returncode == 2 and "method is 'random_start', expected one of" in refused.stderr
    done = recyclable("recycle", "run.yaml", path=installed, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["method"] == "random_start"
    old, new = load_file(outdated / "delta.safetensors"), load_file(tmp_path / "out" / "delta.safetensors")
    for name in old:  # hardly trained: what was added to the base is still there
        assert new[name].norm() == pytest.approx(old[name].norm(), rel=0.5), name
        if old[name].numel() > 500:
            assert abs((new[name] * old[name]).sum() / (new[name].norm() * old[name].norm())) < 0.2, name


def test_a_method_that_takes_a_shipped_ones_name_is_refused(installed: Path, tmp_path: Path) -> None:
    (points,) = installed.glob("*.dist-info/entry_points.txt")
    clash = distribution(tmp_path / "clash", "other", points.read_text().replace("random_start =", "init ="))
    done = recyclable("methods", path=clash, cwd=tmp_path)
    assert done.returncode == 2 and "method 'init' comes from recyclable and from other" in done.stderr


def test_an_installed_kind_of_task_is_listed_and_reads_and_scores_the_rows_that_it_claims(
    kinds: Path, tmp_path: Path
) -> None:
    known = listed(kinds, tmp_path, "tasks")
    assert known["stars"]["from"] == "kinds" and known["regression"]["from"] == "recyclable"
    assert known["stars"]["about"] == "As many stars as a text is worth."
    make_base(tmp_path / "base")
    stars = {"left": "*", "middle": "**", "right": "****"}
    rewrite_rows(make_task(tmp_path / "task"), lambda row: row.update(label=stars[row["label"]]))
    (tmp_path / "run.yaml").write_text(json.dumps({"base": "base", "task": "task", **RUN, "out": "out"}))
    done = recyclable("tune", "run.yaml", path=kinds, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["task"]["problem"] == "stars" and manifest["task"]["labels"] == []
    assert {"pearson", "spearman", "mse"} <= manifest["metrics"]["test"].keys()
    # Hardly trained, so answers are close to 0 and the error to the mean square of the stars: (1 + 4 + 16) / 3.
    assert manifest["metrics"]["test"]["mse"] == pytest.approx(7, rel=0.2)


def test_an_installed_kind_of_language_model_is_used_by_pretrain(kinds: Path, tmp_path: Path) -> None:
    make_base(tmp_path / "base")
    make_corpus(tmp_path / "corpus")
    run = {"lm": "half_hidden", "base": "base", "corpus": "corpus", **RUN, "out": "out"}
    (tmp_path / "run.yaml").write_text(json.dumps(run))
    refused = recyclable("pretrain", "run.yaml", path=None, cwd=tmp_path)
    assert refused.returncode == 2 and "lm is 'half_hidden', expected one of causal, masked, spans" in refused.stderr
    other = recyclable("pretrain", "run.yaml", "mlm_probability=0.15", path=kinds, cwd=tmp_path)
    assert other.returncode == 2 and "mlm_probability: found 0.15, expected: 0.5" in other.stderr
    done = recyclable("pretrain", "run.yaml", path=kinds, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    config = json.loads((tmp_path / "out" / "lineage.json").read_text())["config"]
    assert (config["lm"], config["mlm_probability"]) == ("half_hidden", 0.5)
