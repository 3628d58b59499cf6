"""Where all is whole on a rank its steps wait for no device: a bad one leaves no trace, and is told of later."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import deepspeed
import pytest
import torch
from deepspeed.accelerator import get_accelerator
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from recyclable import distributed
from recyclable.config.settings import TrainSettings
from recyclable.errors import RunError
from recyclable.objectives.objective import Objective
from recyclable.training import states
from recyclable.training.checkpoint.record import Progress
from recyclable.training.engine import engine_for
from recyclable.training.feeding import Fed
from recyclable.training.health import Health
from recyclable.training.loop import train_step

STEPS, MICRO, PARTS = 14, 4, 2
PRECISIONS = {"fp32": {}, "bf16": {"bf16": {"enabled": True}}}
State = dict[str, dict[str, torch.Tensor]]


class Fit(Objective):
    """Two terms of a small regression; a target may be bad for the loss, or for its gradient alone."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.student = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))
        self.weights = {"square": 1.0, "size": 0.5}

    def counts(self, batch: Any) -> dict[str, int]:
        return {"square": len(batch["x"]), "size": 2 * len(batch["x"])}

    def sums(self, batch: Any) -> dict[str, torch.Tensor]:
        found = self.student(batch["x"].to(self.student[0].weight)).float()
        found.register_hook(lambda gradient: gradient * batch["spoils"])
        return {"square": (found - batch["y"]).pow(2).sum(), "size": found.abs().sum()}


def fed(step: int, loss: float = 1.0, gradient: float = 1.0) -> Fed:
    """A step's batches, the last of them spoilt: by what its targets and its gradient are multiplied."""
    made = torch.Generator().manual_seed(step)
    batches = [
        {
            "x": torch.randn(MICRO, 6, generator=made),
            "y": torch.randn(MICRO, 2, generator=made) * (loss if last else 1.0),
            "spoils": torch.tensor(gradient if last else 1.0),
        }
        for last in (False, True)
    ]
    return Fed([(0, step)], batches, torch.tensor([8.0, 16.0, 32.0], dtype=torch.float64))


class Run:
    """Steps of one rank.

    Attributes:
        counted: what `train_step` told of each: sums, counts and tokens.
    """

    def __init__(self, engine: deepspeed.DeepSpeedEngine, settings: TrainSettings) -> None:
        self.engine, self.settings, self.progress = engine, settings, Progress()
        self.health = Health(engine, settings, self.progress, settings.out)
        self.counted: list[list[float]] = []

    def step(self, fed: Fed) -> None:
        *counted, ends = train_step(
            self.engine, self.engine.module, fed, self.progress.step, self.settings, self.health
        )
        assert ends.value() == 0
        self.counted.append(torch.cat([each.reshape(-1) for each in counted]).tolist())
        self.progress.step += 1

    def state(self) -> State:
        """Weights, moments and Adam's count, by parameter."""
        pieces = states.copies(self.engine)
        return {piece.name: {**piece.tensors, "steps": torch.tensor(piece.steps)} for piece in pieces}


@pytest.fixture(autouse=True)
def no_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """No transformers model is trained here."""
    monkeypatch.setattr("recyclable.training.engine.set_attention", lambda *_: None)
    monkeypatch.setattr("recyclable.training.engine.attention.attention_of", lambda _: "none")


@pytest.fixture(autouse=True)
def late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers come as late as a GPU's."""
    monkeypatch.setattr(distributed.Coming, "pending", True)


@contextmanager
def run_in(out: Path, precision: str, **changed: Any) -> Iterator[Run]:
    given = {"max_grad_norm": 0.5, "weight_decay": 0.1, "lr_scheduler_type": "constant", "bad_step": "skip", **changed}
    settings = TrainSettings(out=out, max_steps=STEPS, learning_rate=1e-2, train_batch_size=PARTS * MICRO, **given)
    ds_config = {"train_micro_batch_size_per_gpu": MICRO, **PRECISIONS[precision]}
    out.mkdir(exist_ok=True)
    with distributed.joined(), engine_for(Fit(), settings, ds_config, out) as engine:
        yield Run(engine, settings)


def require_same(found: State, expected: State) -> None:
    assert found.keys() == expected.keys()
    for name, tensors in expected.items():
        assert tensors.keys() == found[name].keys()
        assert all(torch.equal(found[name][kind], tensor) for kind, tensor in tensors.items()), name


BAD = {
    "a loss that is none": {"loss": math.nan},
    "an infinite loss": {"loss": math.inf},
    "a gradient that is none": {"gradient": math.nan},
    "an infinite gradient": {"gradient": math.inf},
    "a spike": {"loss": 100.0},
}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("bad", BAD)
def test_a_bad_step_changes_no_bit_and_what_follows_is_the_run_without_it(
    bad: str, precision: str, tmp_path: Path
) -> None:
    with run_in(tmp_path / "spoilt", precision, spike_factor=5.0) as run:
        for step in range(STEPS):
            before = run.state()
            run.step(fed(step, **BAD[bad]) if step == 11 else fed(step))
            if step == 11:
                require_same(run.state(), before)
                assert before["student.0.weight"]["steps"] == 11
        run.health.settle()
        spoilt, counted, progress = run.state(), run.counted, run.progress
    assert progress.skipped == [12] and len(progress.recent) == STEPS - 1
    assert counted[11] == [0.0] * 5 and all(all(each) for step, each in enumerate(counted) if step != 11)
    with run_in(tmp_path / "without", precision) as run:
        for step in range(STEPS):
            if step == 11:
                run.progress.step += 1
            else:
                run.step(fed(step))
        require_same(spoilt, run.state())


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_first_step_that_is_bad_is_none_to_adam(precision: str, tmp_path: Path) -> None:
    with run_in(tmp_path, precision) as run:
        weights = {name: parameter.clone() for name, parameter in run.engine.module.named_parameters()}
        run.step(fed(0, gradient=math.nan))
        assert {float(of["steps"]) for of in run.state().values()} == {0.0}
        assert not any(of[kind].any() for of in run.state().values() for kind in of if kind.startswith("exp_avg"))
        for name, parameter in run.engine.module.named_parameters():
            assert torch.equal(parameter, weights[name])


def test_the_host_acts_on_a_step_at_the_next_one_or_when_all_is_to_be_settled(tmp_path: Path) -> None:
    with run_in(tmp_path, "bf16", max_bad_steps=1) as run:
        run.step(fed(0, loss=math.nan))
        assert run.progress.skipped == []
        run.step(fed(1))
        assert run.progress.skipped == [1] and (tmp_path / "bad_steps" / "step-00000001.json").exists()
        run.step(fed(2, gradient=math.nan))
        run.health.settle()
        assert run.progress.skipped == [1, 3]
        run.health.settle()
        assert run.progress.skipped == [1, 3]
        run.step(fed(3, gradient=math.nan))
        with pytest.raises(RunError, match=r"^step 4: the norm of the gradients is nan; more than max_bad_steps=1"):
            run.step(fed(4))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_on_a_cpu_the_host_acts_at_once_and_keeps_no_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr("recyclable.training.engine.set_attention", lambda *_: None)
    monkeypatch.setattr("recyclable.training.engine.attention.attention_of", lambda _: "none")
    with run_in(tmp_path, "fp32", max_bad_steps=1) as run:
        run.step(good := fed(0))
        batch = weakref.ref(good.batches[0]["x"])
        del good
        assert batch() is None
        run.step(fed(1, loss=math.nan))
        assert run.progress.skipped == [2] and (tmp_path / "bad_steps" / "step-00000002.json").exists()
        with pytest.raises(RunError, match=r"^step 3: the norm of the gradients is nan; more than max_bad_steps=1"):
            run.step(fed(2, gradient=math.nan))


def test_a_run_that_stops_at_a_bad_step_has_its_batch(tmp_path: Path) -> None:
    with run_in(tmp_path, "fp32", bad_step="stop") as run:
        run.step(fed(0))
        run.step(fed(1, loss=math.inf))
        with pytest.raises(RunError, match=r"^step 2: the loss is inf; no weight was changed by it"):
            run.health.settle()
    assert {path.name for path in (tmp_path / "bad_steps").iterdir()} == {
        "step-00000002.json",
        "step-00000002-rank-00000.safetensors",
    }


# ---- no wait -----------------------------------------------------------------------------------------------------

_ASK = {torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.equal}
"""What has the host wait for a device: `item`, `bool` and `float` of a tensor, indices of a mask, `torch.equal`."""
_COPY = ("tolist", "numpy", "cpu", "__array__")
"""Methods that copy to the host, which a CPU has no operator for."""


class Watch(TorchDispatchMode):
    """Notes each time that the host asks a tensor for its numbers; those of an earlier step may be asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.step, self.watching = 0, False
        self.asked: list[tuple[int, str]] = []
        self.late: list[int] = []

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operator.overloadpacket in _ASK:
            self.note(str(operator))
        return operator(*args, **(kwargs or {}))

    def note(self, what: str) -> None:
        if self.watching:
            self.asked.append((self.step, what))

    @contextmanager
    def over(self, step: int) -> Iterator[None]:
        """While it lasts a step is taken."""
        made, told = distributed.Coming.__init__, distributed.Coming.values

        def coming(which: Any, numbers: torch.Tensor) -> None:
            made(which, numbers)
            which.of_step = self.step

        def values(which: Any) -> list[float]:
            if which.of_step == self.step:
                self.note("the step's own numbers")
            self.late.append(which.of_step)
            self.watching = False
            try:
                return told(which)
            finally:
                self.watching = True

        def noting(name: str) -> Any:
            method = getattr(torch.Tensor, name)

            def noted(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
                self.note(name)
                return method(tensor, *args, **kwargs)

            return noted

        self.step, self.watching = step, True
        with ExitStack() as stack:
            stack.enter_context(patch.object(distributed.Coming, "__init__", coming))
            stack.enter_context(patch.object(distributed.Coming, "values", values))
            for name in _COPY:
                stack.enter_context(patch.object(torch.Tensor, name, noting(name)))
            waiting = patch.object(get_accelerator(), "synchronize", lambda *_: self.note("synchronize"))
            stack.enter_context(waiting)
            stack.enter_context(self)
            yield
        self.watching = False


@pytest.mark.parametrize("factor", [None, 5.0])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_no_step_asks_the_device_for_its_own_numbers(precision: str, factor: float | None, tmp_path: Path) -> None:
    watch = Watch()
    with run_in(tmp_path, precision, spike_factor=factor) as run:
        for step in range(STEPS):
            with watch.over(step):
                train_step(run.engine, run.engine.module, fed(step), step, run.settings, run.health)
            run.progress.step += 1
    assert watch.asked == []
    assert watch.late == list(range(STEPS - 1))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("precision", PRECISIONS)
def test_no_step_waits_for_a_gpu(precision: str, tmp_path: Path) -> None:
    with run_in(tmp_path, precision) as run:
        for step in range(STEPS):
            torch.cuda.set_sync_debug_mode("error" if step else "default")  # the first finds out what there is
            try:
                train_step(run.engine, run.engine.module, fed(step), step, run.settings, run.health)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            run.progress.step += 1


def test_it_is_seen_where_a_step_does_ask(tmp_path: Path) -> None:
    watch, honest = Watch(), Fit.sums

    def sums(self: Fit, batch: Any) -> dict[str, torch.Tensor]:
        found = honest(self, batch)
        assert found["size"].item() > 0 and found["size"] > 0 and found["square"].reshape(1).tolist()
        return found

    with run_in(tmp_path, "fp32") as run, patch.object(Fit, "sums", sums), watch.over(0):
        train_step(run.engine, run.engine.module, fed(0), 0, run.settings, run.health)
    assert {what for _, what in watch.asked} == {"aten._local_scalar_dense.default", "tolist"}
