"""Settings of a run config can be looked up: `recyclable lms`, `tunings` and `methods` list what each kind reads."""

from __future__ import annotations

import json
from typing import Any

import pytest

from recyclable.cli import main
from recyclable.errors import InputError
from recyclable.recipes.pretrain_settings import read_pretrain_settings
from recyclable.recipes.recycle_settings import read_recycle_settings
from recyclable.recipes.tune_settings import read_tune_settings

READ = {
    "lms": (read_pretrain_settings, {"lm": "NAME", "base": "b", "corpus": "c"}),
    "tunings": (read_tune_settings, {"tuning": "NAME", "base": "b", "task": "t"}),
    "methods": (read_recycle_settings, {"method": "NAME", "base": "b", "task": "t", "weights": "w"}),
}


def listed(capsys: Any, *arguments: str) -> list[dict[str, Any]]:
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])[arguments[0]]


@pytest.mark.parametrize("what", READ)
def test_what_is_listed_is_what_the_verbs_run_config_reads(what: str, capsys: Any) -> None:
    read, content = READ[what]
    for one in listed(capsys, what):
        run = {key: one["name"] if value == "NAME" else value for key, value in content.items()}
        with pytest.raises(InputError) as caught:
            read({**run, "out": "o", "max_steps": 1, "learning_rate": 1.0, "zzz": 1}, "run.yaml")
        names = str(caught.value).split(" reads ")[-1].split("; ")[0].split(", ")
        assert sorted(setting["name"] for setting in one["settings"]) == names, one["name"]


def test_one_kind_is_explained(capsys: Any) -> None:
    (lora,) = listed(capsys, "tunings", "lora")
    settings = {one["name"]: one for one in lora["settings"]}
    assert settings["lora_r"]["default"] == 8 and settings["max_steps"]["required"] and settings["seed"]["about"]
    assert main(["lms", "causal"]) == 0
    assert "replay: " in capsys.readouterr().out


def test_an_unknown_one_ends_with_status_2_and_the_names_there_are(capsys: Any) -> None:
    assert main(["tunings", "lorra"]) == 2
    assert "'lorra', expected one of bias, bottleneck, full, ia3, lora, prefix, prompt" in capsys.readouterr().err
