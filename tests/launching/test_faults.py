"""Training through faults: a rank is killed, stopped, raises or is asked to end, in any phase; the run goes on.

Ranks that import nothing large are guarded in test_hub.py; here they train.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from typing import Any

import psutil
import pytest
import yaml
from processes import LAUNCHER_VARIABLES, ROOT, SUPPORT
from verbs import Verbs
from worlds import Chain

from recyclable.training.monitor import Monitor

COMMAND = (
    "import sys; from recyclable.launching.supervisor import launch; "
    "sys.exit(launch({script!r}, sys.argv[1:], nproc=2, restarts={restarts}, fits={fits}))"
)
HOST = socket.gethostname()
TIMEOUT_S = 400
KILLED = "was killed \\(signal 9, SIGKILL, as the system does when memory runs out\\)"
SETTINGS: dict[str, Any] = {
    "tuning": "full",
    "max_steps": 10,
    "train_batch_size": 8,
    "learning_rate": 2e-3,
    "max_length": 24,
    "eval_every": 3,
    "save_every": 3,
}
# name -> (what happens at each start, restarts, on fewer ranks, settings, exit status, lines on standard error)
RUNS: dict[str, tuple[list[Any], int, bool, dict[str, Any], int, list[str]]] = {
    "whole": ([], 0, False, {}, 0, []),
    "smaller": (
        [["step", 1, "killed"]],
        1,
        True,
        {},
        0,
        [
            f"error: rank 1 on {HOST} {KILLED} after step 5; checkpoint of step 3 is whole: go on with --resume",
            "restart 1 of 1: on 1 ranks, with --resume",
        ],
    ),
    "late": (
        [["save", 0, "killed"], ["end", 1, "killed"]],
        2,
        False,
        {},
        0,
        [
            f"error: rank 0 on {HOST} {KILLED} after step [67]; checkpoint of step 3 is whole: go on with --resume",
            "restart 1 of 2: on 2 ranks, with --resume",
            f"error: rank 1 on {HOST} {KILLED} after step 10; checkpoint of step 9 is whole: go on with --resume",
            "restart 2 of 2: on 2 ranks, with --resume",
        ],
    ),
    "early": (
        [["start", 1, "raised"], ["evaluation", 1, "stopped"]],
        1,
        False,
        {},
        1,
        [
            f"error: rank 1 on {HOST} failed: ValueError: at start",
            "restart 1 of 1: on 2 ranks, with --resume",
            rf"error: rank 1 on {HOST} does not run \(SIGSTOP or the like, for \d+ s\) after step 5; "
            "checkpoint of step 3 is whole: go on with --resume",
        ],
    ),
    "asked": (
        [["step", 1, "asked"]],
        1,
        False,
        {"save_every": 0},
        75,
        ["ended( by SIGUSR1|) after step 7, whose checkpoint is written: go on with --resume"],
    ),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    return Chain(tmp_path_factory.mktemp("world"))


def started(world: Chain, name: str, *more: str) -> subprocess.Popen:
    """A run's command; its standard error is read apart."""
    faults, restarts, smaller, settings, *_ = RUNS[name]
    folder = world.folder / name
    folder.mkdir(exist_ok=True)
    (folder / "faults.json").write_text(json.dumps(faults))
    content = {**SETTINGS, "base": str(world.base), "task": str(world.task), "out": str(folder / "out"), **settings}
    (folder / "run.yaml").write_text(yaml.safe_dump(content))
    environment = {key: value for key, value in os.environ.items() if key not in LAUNCHER_VARIABLES}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    fits = "lambda count: 8 % count == 0" if smaller else "None"
    code = COMMAND.format(script=str(SUPPORT / "fault_ranks.py"), restarts=restarts, fits=fits)
    command = [sys.executable, "-c", code, "faults.json", "run.yaml", *more]
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


@pytest.fixture(scope="module")
def runs(world: Chain) -> dict[str, tuple[int, str]]:
    """Exit status and standard error of each; all at once, most of a start is waiting."""
    processes = {name: started(world, name) for name in RUNS}
    ended = {}
    for name, process in processes.items():
        told = process.communicate(timeout=TIMEOUT_S)[1]
        ended[name] = process.returncode, told
    return ended


def weights(world: Chain, name: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (world.folder / name / "out").glob("*.safetensors")}


@pytest.mark.parametrize("name", RUNS)
def test_what_happened_is_told_in_a_line_and_the_run_goes_on_as_often_as_wanted(runs, world, name):
    *_, status, lines = RUNS[name]
    told = [line for line in runs[name][1].splitlines() if line.startswith("recyclable: ")]
    assert len(told) == len(lines), runs[name][1]
    for line, wanted in zip(told, lines, strict=True):
        assert re.fullmatch(f"recyclable: {wanted}", line)
    assert runs[name][0] == status
    assert (world.folder / name / "out" / "manifest.json").exists() == (status == 0)


def test_only_the_rank_that_is_the_cause_shows_a_traceback(runs):
    assert [told.count("Traceback") for _, told in runs.values()] == [0, 0, 0, 1, 0]


def test_no_process_is_left(runs, world):
    mine = [p for p in psutil.process_iter(["cwd"]) if str(world.folder) in (p.info["cwd"] or "")]
    assert mine == []


def test_ranks_that_died_while_saving_and_at_the_end_change_no_bit_of_the_result(runs, world):
    assert len(weights(world, "whole")) == 2
    assert weights(world, "late") == weights(world, "whole")


def test_a_run_that_one_rank_was_asked_to_end_is_gone_on_with_to_the_same_bits(runs, world):
    assert [path.name for path in (world.folder / "asked" / "out" / "checkpoints").iterdir()] == ["step-00000007"]
    again = started(world, "asked", "--resume")
    _, told = again.communicate(timeout=TIMEOUT_S)
    assert again.returncode == 0, told
    assert weights(world, "asked") == weights(world, "whole")


@pytest.mark.parametrize(
    ("sent", "at"), [(signal.SIGTERM, 4), (signal.SIGUSR1, 4), (signal.SIGINT, 4), (signal.SIGTERM, 10)]
)
def test_one_process_writes_a_checkpoint_when_it_is_asked_to_end(world, tmp_path, capsys, monkeypatch, sent, at):
    verbs = Verbs(tmp_path, capsys)
    original = Monitor.step

    def step(self: Monitor, number: int, *losses: Any) -> None:
        original(self, number, *losses)
        if number == at:
            os.kill(os.getpid(), sent)

    before = signal.getsignal(sent)
    run = verbs.training("tune", **{**SETTINGS, "base": world.base, "task": world.task, "save_every": 0})
    with monkeypatch.context() as patch:
        patch.setattr(Monitor, "step", step)
        assert verbs.run(*run) == (
            75,
            [f"recyclable: ended by {sent.name} after step {at}, whose checkpoint is written: go on with --resume"],
        )
    assert signal.getsignal(sent) is before
    assert [path.name for path in (verbs.out / "checkpoints").iterdir()] == [f"step-{at:08d}"]
    assert verbs.run(*run, "--resume")[0] == 0
    assert {path.name for path in verbs.out.iterdir()} >= {"manifest.json"}


def test_before_the_first_step_and_when_somebody_insists_a_process_ends_at_once(world, tmp_path, capsys, monkeypatch):
    verbs = Verbs(tmp_path, capsys)
    run = verbs.training("tune", **{**SETTINGS, "base": world.base, "task": world.task})
    with monkeypatch.context() as patch:
        patch.setattr("recyclable.training.loop.materialize", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        assert verbs.run(*run) == (75, ["recyclable: ended at once by SIGTERM: go on with --resume"])
    assert not verbs.out.exists()

    with monkeypatch.context() as patch:  # while run.yaml is read, which takes seconds where packages are imported
        patch.setattr("recyclable.machine.load_ds_config", lambda *_: os.kill(os.getpid(), signal.SIGINT))
        assert verbs.run(*run) == (75, ["recyclable: ended at once by SIGINT: go on with --resume"])

    def insisted(*_: object) -> None:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Monitor, "step", insisted)
        assert verbs.run(*run) == (75, ["recyclable: ended at once by SIGINT: go on with --resume"])


@pytest.mark.parametrize(
    ("arguments", "refusal"),
    [
        (["--max-restarts", "-1"], "--max-restarts: found -1, expected 0 or more"),
        (["--elastic"], "--elastic: says how to start again, expected --max-restarts beside it"),
    ],
)
def test_restarts_that_make_no_sense_are_refused(world, tmp_path, capsys, arguments, refusal):
    verbs = Verbs(tmp_path, capsys)
    run = verbs.training("tune", **{**SETTINGS, "base": world.base, "task": world.task})
    assert verbs.refused(*run, *arguments) == f"recyclable: error: {refusal}"
