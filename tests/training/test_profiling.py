"""Where the time of a step goes: told rightly of traces whose answer is known, and of a run, which learns the same."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import profile
from verbs import Verbs
from worlds import make_base, make_corpus, make_task

from recyclable.errors import RunError
from recyclable.training.profiling import FOLDER, PHASES, STEPS, Profile, seconds_by_phase, table_of


def event(name: str, begin: float, end: float, cat: str = "user_annotation", **args: Any) -> dict[str, Any]:
    """Of a Chrome trace; times in seconds."""
    return {"ph": "X", "cat": cat, "name": name, "ts": begin * 1e6, "dur": (end - begin) * 1e6, "args": args}


HOST = [
    *(event("profiled steps", 10, 30), event("data", 10, 11), event("forward", 11, 16), event("loss", 14, 15)),
    *(event("backward", 16, 20), event("optimizer", 20, 22), event("evaluation", 22, 27), event("forward", 23, 24)),
    *(event("aten::mm", 12, 13, "cpu_op"), {"ph": "M", "name": "process_name"}),
]


def test_on_a_cpu_every_moment_is_the_innermost_phases_or_a_collectives() -> None:
    found = seconds_by_phase([*HOST, event("gloo:all_reduce", 19, 21), event("gloo:broadcast", 28, 40)])
    expected = {"data": 1, "forward": 5, "loss": 1, "backward": 3, "optimizer": 1, "communication": 4, "other": 1}
    assert found == pytest.approx(expected)  # of an evaluation what a forward pass takes


def test_on_a_gpu_every_moment_is_the_phases_that_launched_what_runs_there() -> None:
    launched = [(11.5, 12, 16), (14.5, 16, 17), (17, 17, 22), (20.5, 23, 24), (25, 25, 26)]
    device = []
    for number, (at, begin, end) in enumerate(launched):
        device.append(event("cudaLaunchKernel", at, at + 0.01, "cuda_runtime", correlation=number))
        device.append(event(f"kernel_{number}", begin, end, "kernel", correlation=number))
    device.append(event("cudaLaunchKernel", 17, 17.1, "cuda_runtime", correlation=9))
    device.append(event("ncclDevKernel_AllReduce", 21, 23, "kernel", correlation=9))
    host = [each for each in HOST if each["name"] != "evaluation" and each.get("ts") != 23e6]
    found = seconds_by_phase([*host, event("evaluation", 24, 27), *device])
    # data 10-11 idle; forward 12-16, loss 16-17, backward 17-22, nccl alone 22-23, optimizer 23-24, idle 11-12, 27-30
    expected = {"data": 1, "forward": 4, "loss": 1, "backward": 5, "optimizer": 1, "communication": 1, "other": 4}
    assert found == pytest.approx(expected)


@pytest.mark.parametrize(
    ("first", "end", "wanted", "steps"),
    [(0, 20, 5, (3, 8)), (0, 6, 5, (1, 6)), (0, 5, 9, (1, 5)), (7, 8, 3, (7, 8)), (4, 30, 2, (7, 9)), (3, 3, 2, None)],
)
def test_a_few_steps_go_ahead_and_where_few_are_left_those_are_profiled(
    first: int, end: int, wanted: int, steps: tuple[int, int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[int] = []
    monkeypatch.setattr(Profile, "_start", lambda self: told.append(self.steps - 1))
    monkeypatch.setattr(Profile, "end", lambda self, step: told.append(step))
    token = STEPS.set(wanted)
    try:
        profile = Profile(Path("x"), "run", first, end)
    finally:
        STEPS.reset(token)
    for step in range(first, end):
        profile.at(step)
    told += [end] if len(told) == 1 else []  # as `profiling` does
    assert tuple(told) == (steps or ())


def test_a_profiled_run_learns_the_same_and_its_phases_are_all_of_its_steps(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    base = make_base(tmp_path / "base")
    own = {"pretrain": {"corpus": make_corpus(tmp_path / "corpus")}, "tune": {"task": make_task(tmp_path / "task")}}
    for verb, settings in own.items():
        found = {}
        for steps in (0, 3):
            verbs = Verbs(tmp_path, capsys)
            run = verbs.training(verb, base=base, max_steps=6, **settings)
            verbs.out = tmp_path / f"{verb}-{steps}"
            assert verbs.run(*run, "--out", verbs.out, *(["--profile", steps] if steps else []))[0] == 0
            found[steps] = {p.name: hashlib.sha256(p.read_bytes()).digest() for p in verbs.out.glob("*.safetensors")}
        assert found[0] == found[3] != {}
        assert not (tmp_path / f"{verb}-0" / FOLDER).exists()
        folder = tmp_path / f"{verb}-3" / FOLDER
        table = json.loads((folder / "table.json").read_text())
        assert table["steps"] == [4, 6] and list(table["phases"]) == sorted(PHASES)
        seconds = {name: phase["seconds"] for name, phase in table["phases"].items()}
        assert sum(seconds.values()) == pytest.approx(table["seconds"])
        assert sum(phase["share"] for phase in table["phases"].values()) == pytest.approx(1)
        assert all(seconds[name] > 0 for name in ("data", "forward", "loss", "backward", "optimizer"))
        events = json.loads((folder / "rank00000.pt.trace.json").read_text())["traceEvents"]
        assert seconds_by_phase(events) == pytest.approx({name: 3 * value for name, value in seconds.items()})
        assert len([each for each in events if each["name"] == "backward" and each.get("ph") == "X"]) == 3
        assert not torch.autograd._profiler_enabled()


@pytest.mark.parametrize("left", ["", '{"traceEvents": [{"ph"'])
def test_a_trace_that_is_not_whole_ends_the_run_in_one_line(
    left: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch says nothing where the disk is full; there may be no file, or a part of one."""
    monkeypatch.setattr(profile, "export_chrome_trace", lambda self, path: left and Path(path).write_text(left))
    (tmp_path / FOLDER).mkdir()
    (tmp_path / FOLDER / "rank00000.pt.trace.json").write_text('{"traceEvents": []}')  # of an earlier start
    token = STEPS.set(1)
    found = Profile(tmp_path, "tune run", 0, 1)
    try:
        found.at(0)
        with pytest.raises(RunError, match=r"trace\.json: cannot be written \(it is not whole, as on a full disk\)$"):
            found.end(1)
    finally:
        found.stop()
        STEPS.reset(token)


def test_a_negative_number_of_steps_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    verbs = Verbs(tmp_path, capsys)
    run = verbs.training("tune", base=make_base(tmp_path / "base"), task=make_task(tmp_path / "task"))
    assert "--profile: found -1" in verbs.refused(*run, "--profile", "-1")


def test_shares_are_of_all_steps_and_seconds_of_one() -> None:
    table = table_of({"forward": 6.0, "other": 2.0}, 3, 7)
    assert table["steps"] == [4, 7] and table["seconds"] == 2
    assert table["phases"] == {"forward": {"seconds": 1.5, "share": 0.75}, "other": {"seconds": 0.5, "share": 0.25}}
