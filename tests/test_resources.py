"""Launch scripts and ds_configs are found from anywhere, from a checkout and from an installed package."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from recyclable.errors import InputError
from recyclable.resources import default_ds_config, ds_config_path, launch_script

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("verb", ["pretrain", "tune", "recycle", "study", "probe", "generate"])
def test_every_training_verb_has_a_launch_script(verb):
    assert launch_script(verb).name == f"{verb}.py"


def test_a_verb_without_a_script_is_refused():
    with pytest.raises(
        InputError,
        match=r"fly: has no launch script, .* evaluate, generate, pretrain, probe, recycle, stack, study, tune",
    ):
        launch_script("fly")


def test_a_shipped_config_is_found_by_name_with_and_without_its_ending():
    assert ds_config_path("7b_zero3") == ds_config_path("7b_zero3.json")
    assert default_ds_config() == ds_config_path("cpu")


def test_a_file_of_ones_own_comes_before_a_shipped_one(tmp_path):
    (tmp_path / "cpu.json").write_text("{}")
    assert ds_config_path("cpu.json") == Path("cpu.json")


@pytest.mark.parametrize("name", ["7b_zero4", "nowhere/cpu.json", "."])
def test_an_unknown_config_is_refused_with_the_list_of_shipped_ones(name):
    with pytest.raises(InputError, match="cpu, cpu_autocast, cpu_bf16"):
        ds_config_path(name)


def test_a_built_package_carries_scripts_and_configs(tmp_path):
    environment = dict(os.environ, PYTHONPATH="")
    build = [sys.executable, "setup.py", "--quiet", "build", "--build-base", str(tmp_path / "b")]
    build += ["egg_info", "--egg-base", str(tmp_path), "build_py", "--build-lib", str(tmp_path / "lib")]
    subprocess.run(build, cwd=ROOT, env=environment, check=True, timeout=60, capture_output=True)
    ask = "from recyclable.resources import *; print(launch_script('tune')); print(default_ds_config())"
    environment["PYTHONPATH"] = str(tmp_path / "lib")
    found = subprocess.check_output([sys.executable, "-c", ask], env=environment, text=True, timeout=60).split()
    assert found == [str(tmp_path / "lib/recyclable" / file) for file in ("launch/tune.py", "ds_configs/cpu.json")]
    for directory in ("launch", "ds_configs"):
        shipped = {path.name for path in (tmp_path / "lib/recyclable" / directory).iterdir() if path.is_file()}
        assert shipped == {path.name for path in (ROOT / directory).iterdir() if path.is_file()}
