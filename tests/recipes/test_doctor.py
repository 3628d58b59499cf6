"""The doctor on this machine alone: what it is, what torch sees of it, room where a run writes."""

from __future__ import annotations

import os

import torch
from worlds import make_base, make_task, write_config

from recyclable.recipes.doctor import doctor
from recyclable.report.doctor_lines import lines


def test_this_machine_is_described_with_room_where_the_run_writes(tmp_path):
    run = {"base": make_base(tmp_path / "base"), "task": make_task(tmp_path / "task"), "out": tmp_path / "out"}
    config = write_config(tmp_path / "run.yaml", {**run, "max_steps": 1, "learning_rate": 1.0})
    found = doctor(None, str(config))
    ((name, report),) = found["hosts"].items()
    assert report["versions"]["torch"] == torch.__version__
    assert report["cpus"] == len(os.sched_getaffinity(0)) and str(tmp_path / "out") in report["folders"]
    tried = found["trial"][name]
    assert (tried["right"], tried["devices"]) == (True, torch.cuda.device_count())
    assert found["right"] and tried["run"] == ""
    told = list(lines(found))
    assert told[0].startswith(f"{name}: python ") and told[-1] == "doctor: nothing is wrong"
    for right, word in ((True, "right"), (False, "wrong")):
        several = {**found, "trial": {name: tried, "another": {**tried, "right": right}}}
        (line,) = [line for line in lines(several) if line.startswith("all-reduce over 2 hosts")]
        assert f": sums are {word}, " in line
