"""Batches made by workers are those that the loop makes itself, and what goes wrong in a worker is told as there."""

from __future__ import annotations

import errno
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import socket
import time
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from processes import finish, outcome, start
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForMaskedLM
from verbs import Verbs
from worlds import make_base, make_corpus, make_outdated, make_roberta, make_task, make_tokenizer

from recyclable.config.settings import TrainSettings
from recyclable.data.blocks import MaskedBlocks
from recyclable.data.examples import model_inputs
from recyclable.data.order import Item, Order
from recyclable.errors import InputError, RunError
from recyclable.launching import guard
from recyclable.training.feeding import Fed, StepBatches, feeding, workers_of

STEPS, BATCH, EXAMPLES = 7, 6, 20
OBJECTIVE: Any = SimpleNamespace(
    weights={"task": 1.0, "kd": 0.5}, counts=lambda batch: {"task": len(batch["labels"]), "kd": 3}
)


class Examples:
    """Batches of every layout that a tensor may have; `at` an item of this index something happens."""

    def __init__(self, at: int | None = None, happens: Any = None) -> None:
        self._at, self._happens = at, happens

    def __len__(self) -> int:
        return EXAMPLES

    def batch(self, items: list[Item]) -> dict[str, torch.Tensor]:
        index = torch.tensor(items)
        if self._at in [number for _, number in items]:
            self._happens()
        longest = int(index.sum(1).max()) + 1
        mask = torch.arange(longest) <= index.sum(1, keepdim=True)
        return {
            "attention_mask": mask.long(),
            "seen": mask,
            "labels": index[:, 0] * 0.5,
            "teacher.logits": (index * 1.7).bfloat16().T,  # not contiguous
            "positions": torch.empty(0, dtype=torch.long),
            "of_all": index.sum(),
            "of_one": index[:1, 0].as_strided((1,), (0,)),
        }


def fed(workers: int, first: int = 0, examples: Examples | None = None, **changed: Any) -> list[Fed]:
    """All that the steps are fed from `first` on."""
    told = {"out": "x", "max_steps": STEPS, "learning_rate": 1e-3, "dataloader_num_workers": workers, **changed}
    made = StepBatches(examples or Examples(), Order(EXAMPLES, BATCH, seed=3), OBJECTIVE, 4)
    with feeding(made, TrainSettings(**told), {}, first) as feed:
        return [feed.next() for _ in range(first, STEPS)]


def assert_same(found: list[Fed], expected: list[Fed]) -> None:
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        assert one.items == other.items
        for own, theirs in zip([{"": one.counts}, *one.batches], [{"": other.counts}, *other.batches], strict=True):
            assert own.keys() == theirs.keys()
            for name, tensor in own.items():
                assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("ahead", [None, 1, 3])
def test_workers_make_what_the_loop_makes_in_its_order_wherever_it_begins(ahead: int | None) -> None:
    own = fed(0)
    assert [[len(batch["labels"]) for batch in each.batches] for each in own] == [[4, 2]] * STEPS
    tokens = own[0].batches[0]["attention_mask"].sum() + own[0].batches[1]["attention_mask"].sum()
    assert own[0].counts.tolist() == [BATCH, 2 * 3, tokens]
    assert_same(fed(2, dataloader_prefetch_factor=ahead), own)
    assert_same(fed(1, first=4), own[4:])


def test_torch_draws_the_same_numbers_whoever_makes_the_batches() -> None:
    drawn = []
    for workers in (0, 2):
        torch.manual_seed(5)
        fed(workers)
        drawn.append(torch.rand(3))
    assert torch.equal(*drawn)


def raise_full() -> None:
    raise OSError(errno.EIO, "Input/output error", "ids.bin")


def raise_short() -> None:
    raise RunError("corpus/ids.bin", "ends before sequence 4: it was cut short")


def raise_bad() -> None:
    raise InputError("corpus", "is broken")


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("happens", [raise_full, raise_short, raise_bad])
def test_what_has_a_line_of_its_own_has_it_from_a_worker_too(workers: int, happens: Any) -> None:
    with pytest.raises((InputError, OSError)) as expected:
        happens()
    with pytest.raises(expected.type) as found:
        fed(workers, examples=Examples(9, happens))
    assert str(found.value) == str(expected.value) and found.type is expected.type
    assert getattr(found.value, "errno", None) == getattr(expected.value, "errno", None)


def test_an_error_of_the_program_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError, match=r"(?s)in batch.*1 / 0"):
        fed(1, examples=Examples(9, lambda: 1 / 0))


def test_a_worker_that_is_ended_from_outside_ends_the_run_in_one_line() -> None:
    examples = Examples(9, lambda: os.kill(os.getpid(), signal.SIGKILL))
    line = "dataloader_num_workers: a worker that makes batches is gone: .*: dataloader_num_workers: 0 goes without"
    with pytest.raises(RunError, match=line):
        fed(1, examples=examples)


def test_a_worker_that_does_not_end_when_told_to_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.2)  # s that torch waits, twice
    before = set(multiprocessing.active_children())
    order = Order(EXAMPLES, BATCH, seed=3)
    stuck = order.step(1)[0][1]
    assert stuck not in [number for _, number in order.step(0)]
    made = StepBatches(Examples(stuck, lambda: time.sleep(600)), order, OBJECTIVE, 4)
    settings = TrainSettings(out=Path("x"), max_steps=STEPS, learning_rate=1e-3, dataloader_num_workers=1)
    with feeding(made, settings, {}, 0) as feed:
        feed.next()
    assert set(multiprocessing.active_children()) == before


def test_nobody_works_ahead_on_a_gpu_whose_host_lacks_the_room_unless_asked_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8))
    monkeypatch.delenv("LOCAL_SIZE", raising=False)
    free, told = 1 << 30, {"out": "x", "max_steps": STEPS, "learning_rate": 1e-3}
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    machines: list[dict[str, Any]] = [
        {"zero_optimization": {"stage": 3, **offloaded}}
        for offloaded in ({}, {"offload_optimizer": {"device": "cpu"}}, {"offload_param": {"device": "nvme"}})
    ]
    assert [workers_of(TrainSettings(**told), machine) for machine in machines] == [2, 0, 0]
    asked = TrainSettings(**told, dataloader_num_workers=3)
    assert [workers_of(asked, machine) for machine in machines] == [3, 3, 3]
    free -= 1
    assert (workers_of(TrainSettings(**told), {}), workers_of(asked, {})) == (0, 3)


def test_no_worker_is_left_and_signals_that_ask_for_an_end_are_for_the_rank_alone() -> None:
    before = set(multiprocessing.active_children())

    def all_at_once() -> None:
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP):
            os.kill(os.getpid(), number)

    assert_same(fed(2, examples=Examples(9, all_at_once)), fed(0))
    assert set(multiprocessing.active_children()) == before
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set()


def be_a_rank(told: Connection) -> None:
    """Feed two steps, tell which workers hold the socket that a guardian would listen to, and stay."""
    guard._guardian = own, _ = socket.socketpair()
    made = StepBatches(Examples(), Order(EXAMPLES, BATCH, seed=3), OBJECTIVE, 4)
    settings = TrainSettings(out=Path("x"), max_steps=1000, learning_rate=1e-3, dataloader_num_workers=2)
    with feeding(made, settings, {}, 0) as feed:
        feed.next(), feed.next()  # one of each worker
        workers = [each.pid for each in multiprocessing.active_children()]
        socket_itself = os.readlink(f"/proc/self/fd/{own.fileno()}")  # its number may be another file's in a worker
        told.send({worker: socket_itself in opened(worker) for worker in workers})
        time.sleep(600)


def opened(pid: int) -> set[str]:
    """What a process has open; a file may be closed while this looks."""
    found = set()
    for each in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):
            found.add(os.readlink(each))
    return found


def test_workers_die_with_their_rank_and_do_not_hold_what_its_guardian_listens_to() -> None:
    heard, told = multiprocessing.Pipe(duplex=False)
    rank = multiprocessing.get_context("fork").Process(target=be_a_rank, args=(told,))
    rank.start()
    try:
        assert heard.poll(120)
        workers = heard.recv()
        assert len(workers) == 2 and not any(workers.values())
    finally:
        rank.kill()
        rank.join()
    deadline = time.monotonic() + 60
    while any(map(runs, workers)):
        assert time.monotonic() < deadline, "a worker has outlived its rank"
        time.sleep(0.02)


def runs(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_on_a_gpu_a_model_is_told_of_no_mask_where_nothing_is_padding(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would look at it there, at every pass, and the host would wait; what it computes is the same."""
    folder = (make_base if family == "bert" else make_roberta)(tmp_path / "base")
    model, tokenizer = AutoModelForMaskedLM.from_pretrained(folder).eval(), make_tokenizer()
    texts = np.random.default_rng(1).integers(5, len(tokenizer), size=(EXAMPLES, 12))
    objective: Any = SimpleNamespace(weights={"mlm": 1.0}, counts=lambda batch: {"mlm": len(batch["targets"])})
    made = {}
    for on_gpu in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=on_gpu: there)
        blocks = MaskedBlocks(texts, tokenizer, 0.3, seed=2, indices=range(EXAMPLES))
        made[on_gpu] = StepBatches(blocks, Order(EXAMPLES, BATCH, seed=3), objective, BATCH)[0]
    monkeypatch.undo()
    told, alike = (model_inputs(made[on_gpu].batches[0]) for on_gpu in (False, True))
    assert told.keys() - alike.keys() == {"attention_mask"} and made[True].counts.equal(made[False].counts)
    assert torch.equal(model(**told).logits, model(**alike).logits)


# ---- whole runs --------------------------------------------------------------------------------------------------


def results(out: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in out.glob("*.safetensors")}


def test_runs_end_with_the_same_bits_with_and_without_workers_and_across_a_resume(tmp_path: Path) -> None:
    base, task, corpus = make_base(tmp_path / "base"), make_task(tmp_path / "task"), make_corpus(tmp_path / "corpus")
    common = {"base": base, "max_steps": 4, "train_batch_size": 8, "learning_rate": 2e-3, "max_length": 24}
    common |= {"eval_every": 4, "save_every": 2}
    own: dict[str, dict[str, Any]] = {
        "pretrain": {"corpus": str(corpus)},
        "recycle": {
            **{"task": str(task), "group_by_length": True, "method": "both", "teacher_cache": str(tmp_path / "cache")},
            **{"weights": make_outdated(base, task, tmp_path / "outdated"), "old_base": base},
        },
    }
    machine = {"zero_optimization": {"stage": 2}, "train_micro_batch_size_per_gpu": 2}
    listed = []
    for verb, settings in own.items():
        for workers, how in (
            (0, {}),
            (2, {"raise_at": 3, "outcome": tmp_path / f"{verb}-fed-first"}),
            (1, {"resume": True}),
        ):
            out = tmp_path / f"{verb}-{'fed' if workers else 'own'}"
            config = {**common, **settings, "out": out, "dataloader_num_workers": workers}
            listed.append({"verb": verb, "config": config, "ds_config": machine, **how})
    finish(start(tmp_path / "runs", listed, nproc=2), tmp_path / "runs")
    for verb in own:
        expected = results(tmp_path / f"{verb}-own")
        assert expected and outcome(tmp_path / f"{verb}-fed-first")["error"] == "Interrupted"
        assert results(tmp_path / f"{verb}-fed") == expected


def test_tensorboard_shows_the_wait_for_batches_and_the_memory(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    verbs, original = Verbs(tmp_path, capsys), StepBatches.__getitem__

    def slow(self: StepBatches, step: int) -> Any:
        time.sleep(0.2)
        return original(self, step)

    monkeypatch.setattr(StepBatches, "__getitem__", slow)
    base, task = make_base(tmp_path / "base"), make_task(tmp_path / "task")
    run = verbs.training("tune", base=base, task=task, max_steps=4, log_every=2)
    assert verbs.run(*run)[0] == 0
    events = EventAccumulator(str(verbs.out / "tensorboard")).Reload()
    waits, steps_a_second = (
        [event.value for event in events.Scalars(f"perf/{name}")] for name in ("data_wait", "examples_per_s")
    )
    assert all(0.2 * rate / 4 < wait < 1 for wait, rate in zip(waits, steps_a_second, strict=True))  # 4 examples a step
    held = [event.value for event in events.Scalars("perf/peak_memory_gb")]
    assert all(0.05 < each < 100 for each in held) and held == sorted(held)


def test_a_step_ahead_of_nobody_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    base, task = make_base(tmp_path / "base"), make_task(tmp_path / "task")
    verbs, settings = Verbs(tmp_path, capsys), {"dataloader_num_workers": 0, "dataloader_prefetch_factor": 4}
    said = verbs.refused(*verbs.training("tune", base=base, task=task, **settings))
    assert "dataloader_prefetch_factor is given, but nothing reads it with dataloader_num_workers: 0" in said
    run = {"lora": {"task": str(task), "max_steps": 1, "learning_rate": 1e-3, "dataloader_num_workers": 2}}
    (tmp_path / "stack.yaml").write_text(json.dumps({"base": str(base), "out": str(tmp_path / "out"), "runs": run}))
    assert "a stack's ranks make their batches themselves" in verbs.refused("stack", tmp_path / "stack.yaml")
