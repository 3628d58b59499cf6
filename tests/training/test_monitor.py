"""What a log hears of a run: lines at log points and in long silences, told by a clock that the tests move."""

from __future__ import annotations

import re
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from recyclable import distributed
from recyclable.config.settings import TrainSettings
from recyclable.training import monitor
from recyclable.training.monitor import Log, Monitor, duration


class Written:
    """Stands in for DeepSpeed's monitor."""

    def __init__(self) -> None:
        self.scalars: dict[str, dict[int, float]] = {}

    def write_events(self, events: list[tuple[str, float, int]]) -> None:
        for name, value, step in events:
            self.scalars.setdefault(name, {})[step] = value


class Run:
    """A run of two terms, weighted 1 and 0.5, whose clock stands still but for what a test says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, start: int = 0, **settings: Any) -> None:
        monkeypatch.setattr(monitor, "model_flops", lambda _: None)
        self.seconds, self.written = 0.0, Written()
        module = SimpleNamespace(weights={"task": 1.0, "kd": 0.5}, passes=lambda _: [{}])
        engine = SimpleNamespace(
            module=module, device="cpu", monitor=self.written, get_global_grad_norm=lambda: torch.tensor(2.0)
        )
        known = {"learning_rate": 1e-3, "train_batch_size": 4, "out": "x", "log_every": 10, **settings}
        self.monitor = Monitor(engine, TrainSettings(**known), "tune run", clock=lambda: self.seconds)
        self.start = start

    def steps(self, first: int, last: int, each_s: float) -> None:
        """Steps of `each_s` seconds, 100 tokens, 4 examples a term, and sums of 8 and 4: a loss of 2 + 0.5 x 1."""
        for step in range(first, last + 1):
            self.seconds += each_s
            self.monitor.step(step, *(torch.tensor(v, dtype=torch.float64) for v in ([8.0, 4.0], [4.0, 4.0], 100.0)))

    def pause(self, step: int, seconds: float) -> None:
        self.seconds += seconds
        self.monitor.scores(step, {"accuracy": 0.5})


def test_every_log_point_has_its_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    run = Run(monkeypatch, max_steps=25)
    with run.monitor.bar(0):
        run.pause(0, 500)
        run.steps(1, 25, 2)
    assert capsys.readouterr().out.splitlines() == [
        "tune run  step 0/25  accuracy 0.5000",
        "tune run  step 10/25  loss 2.5000  50 tokens/s  30 s left",
        "tune run  step 20/25  loss 2.5000  50 tokens/s  10 s left",
        "tune run  step 25/25  loss 2.5000  50 tokens/s",
    ]


def test_between_far_log_points_a_line_a_minute(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    run = Run(monkeypatch, max_steps=20)
    with run.monitor.bar(0):
        run.steps(1, 20, 25)
    found = [re.findall(r"step (\d+)/20  (loss|4 tokens)", line)[0] for line in capsys.readouterr().out.splitlines()]
    no_loss_yet, known = "4 tokens", "loss"
    assert found == [
        *(("3", no_loss_yet), ("6", no_loss_yet), ("9", no_loss_yet), ("10", known)),
        *(("13", known), ("16", known), ("19", known), ("20", known)),
    ]


def test_the_lines_between_ask_nothing_of_other_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """They come by rank 0's clock: a collective in them would wait for ranks that see no minute gone."""
    asked = []
    monkeypatch.setattr(distributed, "sum_over_ranks", lambda tensor: asked.append(1) or tensor)
    run = Run(monkeypatch, max_steps=40, log_every=20)
    with run.monitor.bar(0):
        run.steps(1, 40, 100)
    assert len(asked) == 2


def test_an_evaluation_is_no_step_time_wherever_it_falls_between_log_points(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(monkeypatch, max_steps=30)
    with run.monitor.bar(0):
        run.pause(0, 70)
        for first in range(1, 30, 5):
            run.steps(first, first + 4, 2)
            run.pause(first + 4, 1000)
    assert run.written.scalars["perf/tokens_per_s"] == {10: 50, 20: 50, 30: 50}
    assert run.written.scalars["perf/examples_per_s"] == {10: 2, 20: 2, 30: 2}


def test_the_norm_of_gradients_that_were_left_out_is_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """A spike's is finite."""
    run, nothing = Run(monkeypatch, max_steps=30), torch.zeros(2, dtype=torch.float64)
    with run.monitor.bar(0):
        run.steps(1, 19, 2)
        run.monitor.step(20, nothing, nothing, nothing[0])
        run.monitor.step(21, nothing, nothing, nothing[0])
        run.steps(22, 30, 2)
    assert run.written.scalars["train/loss"].keys() == {10, 20, 30}
    assert run.written.scalars["train/grad_norm"] == {10: 2, 30: 2}


def test_the_time_left_counts_evaluations_and_only_what_this_start_has_done(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    run = Run(monkeypatch, max_steps=1000)
    run.seconds += 9999  # reading a checkpoint
    with run.monitor.bar(500):
        run.steps(501, 505, 2)
        run.pause(505, 80)
        run.steps(506, 510, 2)
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "tune run  step 510/1000  loss 2.5000  50 tokens/s  1 h 22 min left"  # 490 x 10 s


def test_other_ranks_and_terminals_get_no_lines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    run = Run(monkeypatch, max_steps=20)
    with monkeypatch.context() as other:
        other.setattr(distributed, "rank", lambda: 1)
        with run.monitor.bar(0):
            run.steps(1, 20, 100)
            run.pause(20, 1)
    assert capsys.readouterr().out == "" and run.written.scalars == {}
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with run.monitor.bar(0):
        run.steps(1, 20, 100)
        run.pause(20, 1)
    captured = capsys.readouterr()
    assert captured.out == "" and "20/20" in captured.err


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        *((0.2, "0 s"), (59.4, "59 s"), (59.6, "1 min"), (3569, "59 min"), (3571, "1 h 0 min"), (4325, "1 h 12 min")),
        *((86_369, "23 h 59 min"), (86_390, "1 d 0 h"), (200_000, "2 d 7 h")),
    ],
)
def test_a_time_is_told_by_its_two_largest_units(seconds: float, said: str) -> None:
    assert duration(seconds) == said


def test_a_stack_tells_its_steps_at_log_points_in_long_silences_and_at_the_end(capsys: pytest.CaptureFixture) -> None:
    now = [0.0]
    log = Log("stack s", 4, 9, every=3, clock=lambda: now[0])
    for step, seconds in [(5, 10.0), (6, 20.0), (7, 79.0), (8, 81.0), (9, 90.0)]:
        now[0] = seconds
        log.step(step, "2 of 2 runs under way")
    told = ["step 6/9  2 of 2 runs under way  30 s left", "step 8/9  2 of 2 runs under way  20 s left"]
    expected = [f"stack s  {line}" for line in [*told, "step 9/9  2 of 2 runs under way"]]
    assert capsys.readouterr().out.splitlines() == expected
    Log("stack s", 0, 9, every=1, silent=True).step(1, "")
    assert not capsys.readouterr().out
