"""Online, partitioned and cached teachers teach the same; a cache is used where it is right and noticed where not."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import STAGE_3, finish, outcome, scalars, start
from torch import nn
from worlds import make_base, make_outdated, make_task, make_upgraded

from recyclable.data.examples import LabelledTexts
from recyclable.data.order import Order
from recyclable.errors import InputError
from recyclable.methods.parts.method import Method
from recyclable.models.tasks import task_model
from recyclable.objectives.distillation import Distillation
from recyclable.objectives.teacher_cache import TaughtExamples, TeacherCache, open_cache
from recyclable.objectives.teachers import CachedTeacher, OnlineTeacher
from recyclable.recipes.recycle_settings import read_recycle_settings
from recyclable.tasks.parts.task import load_task
from recyclable.training import teaching
from recyclable.weights.base import Base
from recyclable.weights.sources import fill
from recyclable.weights.vocabulary import load_tokenizer

STEPS = 12
COMMON = {
    "method": "both",
    "max_steps": STEPS,
    "train_batch_size": 12,
    "learning_rate": 5e-3,
    "max_length": 24,
    "dropout": 0.0,
    "shots": 16,
    "eval_every": STEPS,
    "eval_batch_size": 7,
    "save_every": 0,
    "log_every": 1,
    "alpha": 0.6,
    "beta": 3.0,
    "temperature": 4.0,
}
KINDS: dict[str, dict[str, Any]] = {
    "online": {"teacher": "online"},
    "cached": {"teacher": "cached"},
    "directory": {"teacher": "cached", "teacher_cache": "answers"},
    "online_top2": {"teacher": "online", "teacher_top_k": 2},
    "cached_top2": {"teacher": "cached", "teacher_cache": "answers", "teacher_top_k": 2},
    "online_grouped": {"teacher": "online", "group_by_length": True},
    "cached_grouped": {"teacher": "cached", "group_by_length": True},
    "online_bf16": {"teacher": "online"},
    "cached_bf16": {"teacher": "cached", "teacher_cache": "answers"},
    "online_autocast": {"teacher": "online", "attn_implementation": "eager"},
    "cached_autocast": {"teacher": "cached", "attn_implementation": "eager"},
    "online_lora": {"teacher": "online", "method": "distill"},
    "cached_lora": {"teacher": "cached", "method": "distill"},
}
# ranks -> (kind, ZeRO stage)
RUNS = {
    1: [(kind, 0) for kind in ("online", "cached", "online_autocast", "cached_autocast")]
    + [(f"{kind}_{way}", 1) for kind in ("online", "cached") for way in ("grouped", "top2")],
    2: [(kind, 2) for kind in ("online", "directory")]
    + [(f"{kind}{way}", 3) for kind in ("online", "cached") for way in ("", "_bf16", "_lora")],
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    world = tmp_path_factory.mktemp("teachers")
    make_base(world / "base")
    make_upgraded(world / "base", world / "upgraded")
    make_task(world / "task")
    make_outdated(world / "base", world / "task", world / "outdated")
    return world


def out(world: Path, kind: str, ranks: int, stage: int) -> Path:
    return world / f"{kind}-{ranks}-{stage}"


def recycling(world: Path, folder: Path, **changed: Any) -> dict[str, Any]:
    own = {
        "base": world / "upgraded",
        "old_base": world / "base",
        "weights": world / "outdated",
        "task": world / "task",
    }
    return {
        name: str(v) if isinstance(v, Path) else v for name, v in {**COMMON, **own, "out": folder, **changed}.items()
    }


def run(world: Path, kind: str, ranks: int, stage: int) -> dict[str, Any]:
    changed = dict(KINDS[kind])
    if kind.endswith("lora"):
        changed["weights"] = world / "lora"
    if "teacher_cache" in changed:
        changed["teacher_cache"] = world / f"{changed['teacher_cache']}-{ranks}-{stage}"
    zero = {"stage": stage, **(STAGE_3 if stage == 3 else {})}
    ds_config: dict[str, Any] = {"train_micro_batch_size_per_gpu": 12 // ranks // 2, "zero_optimization": zero}
    if kind.endswith("bf16"):
        ds_config["bf16"] = {"enabled": True}
    if kind.endswith("autocast"):
        ds_config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    look = (kind, stage) == ("online", 3)
    config = recycling(world, out(world, kind, ranks, stage), **changed)
    return {"verb": "recycle", "config": config, "ds_config": ds_config, "look": look}


@pytest.fixture(scope="module")
def trained(world: Path) -> Path:
    """The world after all runs: in one process, and on two ranks."""
    started = []
    for ranks, plan in RUNS.items():
        runs = [run(world, kind, ranks, stage) for kind, stage in plan]
        if ranks == 2:
            config = {"base": world / "base", "task": world / "task", "tuning": "lora", "out": world / "lora"}
            kept = ("train_batch_size", "max_length", "eval_every", "save_every")
            config.update({name: COMMON[name] for name in kept}, max_steps=STEPS, learning_rate=2e-2)
            runs.insert(0, {"verb": "tune", "config": config, "ds_config": {"zero_optimization": {"stage": 2}}})
        folder = world / f"ranks-{ranks}"
        started.append((start(folder, runs, nproc=ranks if ranks > 1 else None), folder))
    for process, folder in started:
        finish(process, folder)
    return world


@pytest.mark.parametrize(
    ("kind", "as_good_as", "ranks", "stage"),
    [
        ("cached", "online", 1, 0),
        ("cached_grouped", "online_grouped", 1, 1),
        ("cached_top2", "online_top2", 1, 1),
        ("directory", "online", 2, 2),
        ("cached", "online", 2, 3),
        ("cached_lora", "online_lora", 2, 3),
    ],
)
def test_the_students_losses_are_the_same_whichever_teacher_is_used(trained, kind, as_good_as, ranks, stage) -> None:
    for tag, near in {"loss": 0, "task": 1e-6, "kd": 1e-6, "patient": 1e-6}.items():
        found, wanted = (scalars(out(trained, name, ranks, stage), f"train/{tag}") for name in (kind, as_good_as))
        assert found == pytest.approx(wanted, rel=1e-5, abs=near)
        assert len(found) == STEPS and max(found) > 1.05 * min(found)


def test_a_partitioned_teacher_teaches_what_a_whole_one_does(trained) -> None:
    whole = scalars(out(trained, "online", 1, 0), "train/loss")
    for stage in (2, 3):
        assert scalars(out(trained, "online", 2, stage), "train/loss") == pytest.approx(whole, rel=1e-4)


def test_autocast_computes_in_bf16_near_what_fp32_does(trained) -> None:
    precise, autocast = (scalars(out(trained, kind, 1, 0), "train/loss") for kind in ("cached", "cached_autocast"))
    assert autocast == pytest.approx(precise, rel=2e-2)
    assert autocast != pytest.approx(precise, rel=1e-6), "nothing was computed in bf16"
    online = scalars(out(trained, "online_autocast", 1, 0), "train/loss")
    assert autocast == pytest.approx(online, rel=1e-2)


def test_in_bf16_a_cached_teacher_is_as_near_as_rounding_allows(trained) -> None:
    cached, online = (scalars(out(trained, f"{kind}_bf16", 2, 3), "train/loss") for kind in ("cached", "online"))
    assert cached == pytest.approx(online, rel=2e-2)
    keys = [(path / "key.json").read_text() for path in (trained / "answers-2-3").iterdir()]
    assert ["bfloat16" in key for key in keys] == [True]


def test_the_likeliest_classes_alone_teach_something_else(trained) -> None:
    two, all_of_them = (
        scalars(out(trained, *which), "train/kd") for which in (("online_top2", 1, 1), ("online", 1, 0))
    )
    assert two[0] > 2 * all_of_them[0]


def test_a_teacher_under_zero_3_is_partitioned_has_no_moments_and_leaks_nothing(trained) -> None:
    held = outcome(out(trained, "online", 2, 3))["held"]
    assert len(held) == STEPS
    task = load_task(str(trained / "task"))
    model = fill(task_model(Base(trained / "base"), task, 0))
    size, padding = sum(p.numel() for p in model.parameters()), len(list(model.parameters()))
    for step in held:
        assert size / 2 <= step["teacher"] <= size / 2 + padding, "more than this rank's half of the teacher is here"
        assert size <= step["moments"] <= size + 2 * padding, "two moments of half the student, none of the teacher"
    for what in ("tensors", "all"):
        assert len({step[what] for step in held[2:]}) == 1, [step[what] for step in held]


# ---- the cache, in this process ----------------------------------------------------------------------------------


class Desk:
    """Fills caches as a run would, and counts how often a teacher answered."""

    def __init__(self, world: Path, tmp_path: Path) -> None:
        self.world, self.root, self.asked = world, tmp_path / "answers", 0

    def config(self, **changed: Any) -> Method:
        changed = {"teacher_cache": self.root, **changed}
        return read_recycle_settings(recycling(self.world, self.world / "unused", **changed), "recycle.yaml")

    def examples(self, config: Method, rows: slice = slice(None)) -> LabelledTexts:
        train = load_task(config.task).splits["train"]
        tokenizer = load_tokenizer(self.world / "base")
        return LabelledTexts(train.take(range(len(train))[rows]), tokenizer, config.max_length)

    def model(self, seed: int = 3) -> nn.Module:
        task = load_task(str(self.world / "task"))
        model = fill(task_model(Base(self.world / "base"), task, seed))

        def count(_: nn.Module, __: Any, output: Any) -> None:
            self.asked += len(output.logits)

        model.register_forward_hook(count)
        return model

    def fill(self, weights: str = "these", rows: slice = slice(None), **changed: Any) -> TaughtExamples:
        """A cache filled for some rows of train; what it says is on standard output."""
        config = self.config(**changed)
        cache, stale = open_cache(config.teacher_cache, {"weights": weights, "top_k": config.teacher_top_k})
        if stale:
            print(stale)
        examples = self.examples(config, rows)
        used = Order(len(examples), config.train_batch_size, 20).used(config.max_steps)
        kind = load_task(config.task).kind

        def teacher() -> OnlineTeacher:
            return OnlineTeacher(self.model(), kind, top_k=config.teacher_top_k)

        teaching.fill(cache, examples, used, teacher, config.eval_batch_size, {})
        return TaughtExamples(examples, cache, used)

    def files(self) -> list[Path]:
        return sorted(self.root.rglob("*.safetensors"))


@pytest.fixture
def desk(world: Path, tmp_path: Path) -> Desk:
    return Desk(world, tmp_path)


def signals(taught: TaughtExamples, rows: list[int]) -> dict[str, torch.Tensor]:
    return CachedTeacher().signals(taught.batch([(5, row) for row in rows])).tensors()


def test_cached_signals_are_the_models_outputs_for_the_examples_in_the_batch(desk: Desk) -> None:
    rows = [40, 3, 17, 3]
    taught = desk.fill()
    batch = desk.examples(desk.config()).batch([(0, row) for row in rows])
    batch.pop("labels")
    with torch.no_grad():
        wanted = desk.model().eval()(**batch, output_hidden_states=True)
    found = signals(taught, rows)
    assert found.keys() == {"logits", "states"}
    assert torch.allclose(found["logits"], wanted.logits, atol=1e-5)
    for layer, states in enumerate(wanted.hidden_states[:-1]):
        assert torch.allclose(found["states"][:, layer], states[:, 0], atol=1e-5)


def test_each_example_is_asked_once_and_only_if_a_step_uses_it(desk: Desk) -> None:
    desk.fill(max_steps=2)
    assert desk.asked == 24
    desk.fill(max_steps=3)
    assert desk.asked == 36
    desk.fill(max_steps=1000)
    assert desk.asked == 90
    desk.fill(max_steps=1000, method="distill", alpha=0.1)
    assert desk.asked == 90
    assert len(desk.files()) == 3


def test_answers_serve_other_examples_of_other_runs_where_the_tokens_are_the_same(desk: Desk) -> None:
    desk.fill(rows=slice(0, 60))
    assert desk.asked == 60
    desk.fill(rows=slice(30, 90))
    assert desk.asked == 90
    lengths = desk.examples(desk.config()).lengths
    desk.fill(max_length=12)
    assert desk.asked == 90 + (lengths > 12).sum(), "texts that are cut elsewhere are other examples"


def test_the_teacher_is_not_even_loaded_when_all_is_known(desk: Desk) -> None:
    desk.fill()

    def fails() -> nn.Module:
        raise AssertionError("loaded")

    desk.model = fails  # type: ignore[method-assign]
    desk.fill()


def test_another_teacher_or_setting_is_noticed_and_asked(desk: Desk, capsys: pytest.CaptureFixture) -> None:
    desk.fill()
    assert "not used" not in capsys.readouterr().out
    desk.fill(weights="others")
    assert "outputs for other weights: they are not used" in capsys.readouterr().out
    assert desk.asked == 180
    taught = desk.fill(teacher_top_k=2)
    assert "outputs for other top_k: they are not used" in capsys.readouterr().out
    assert signals(taught, [0, 1])["logits"].shape == (2, 2)
    desk.fill()
    assert "not used" not in capsys.readouterr().out and desk.asked == 270


@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
def test_a_damaged_file_is_noticed_and_its_answers_are_computed_again(desk: Desk, capsys, damage: str) -> None:
    before = signals(desk.fill(max_steps=2), Order(90, 12, 20).used(2))
    desk.fill(max_steps=1000)
    path = next(path for path in desk.files() if len(TaughtRows(path)) == 24)
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes({"flip": content, "cut": content[:-9], "empty": b""}[damage])
    capsys.readouterr()
    again = desk.fill(max_steps=1000)
    assert f"{path} is damaged" in (said := capsys.readouterr().out) and "24 answers computed, 66 known" in said
    after = signals(again, Order(90, 12, 20).used(2))
    assert all(torch.allclose(before[name], after[name], atol=1e-5) for name in before)
    desk.fill(max_steps=1000)
    assert "damaged" not in capsys.readouterr().out and desk.asked == 90 + 24


class TaughtRows:
    """How many examples a file holds."""

    def __init__(self, path: Path) -> None:
        cache = TeacherCache(path.parent)
        cache.read([path.name])
        self._where = cache._where

    def __len__(self) -> int:
        return len(self._where)


def test_what_a_killed_job_left_half_written_is_not_looked_at(desk: Desk) -> None:
    desk.fill(max_steps=2)
    (desk.files()[0].parent / "0123.aside").write_bytes(b"half")
    (desk.files()[0].parent / ".0123.aside.partial").write_bytes(b"half")
    desk.fill(max_steps=2)
    assert desk.asked == 24


def test_answers_on_disk_are_read_when_they_are_asked_for(desk: Desk) -> None:
    """A file that is cut short meanwhile is an error in one line, where one mapped into memory ends the process."""
    taught = desk.fill()
    assert len(signals(taught, [1])["logits"]) == 1
    for file in desk.files():
        os.truncate(file, 1000)
    with pytest.raises(InputError, match=r"ends within .*: it was cut short after it was opened$"):
        [signals(taught, [row]) for row in taught.used]


def test_jobs_that_write_and_read_at_once_do_not_disturb_each_other(tmp_path: Path) -> None:
    problems: list[BaseException] = []

    def job(number: int) -> None:
        try:
            for turn in range(15):
                cache, _ = open_cache(tmp_path, {"weights": turn % 3})
                cache.read(cache.files()[0])
                examples = [bytes([turn % 3, i]) * 8 for i in range(number, number + 6)]
                missing = cache.missing(examples)
                if missing:
                    value = torch.tensor([[example[0], example[1]] for example in missing]).float()
                    cache.keep(missing, {"logits": value, "states": value[:, None]})
                whole, damaged = cache.files()
                assert not damaged
                cache.read(whole)
                found = cache.rows(examples)
                assert found["logits"].tolist() == [[example[0], example[1]] for example in examples]
                assert found["states"].shape == (6, 1, 2)
        except BaseException as error:
            problems.append(error)

    jobs = [threading.Thread(target=job, args=(number,)) for number in (0, 0, 3, 5)]
    for thread in jobs:
        thread.start()
    for thread in jobs:
        thread.join()
    assert not problems, problems


def test_a_cache_that_is_a_file_is_refused(desk: Desk) -> None:
    desk.root.write_text("")
    with pytest.raises(InputError, match="teacher_cache"):
        desk.fill()


def test_the_loss_does_not_depend_on_how_the_batch_was_padded_for_the_teacher(desk: Desk) -> None:
    """The same module on the same batch, taught online and from answers computed in other company."""
    taught, task = desk.fill(), load_task(str(desk.world / "task"))
    student, kind = fill(task_model(Base(desk.world / "upgraded"), task, 1, 0.0)), task.kind
    settings = {"alpha": 0.6, "beta": 3.0, "temperature": 4.0}
    online = Distillation(student, kind, OnlineTeacher(desk.model(), kind), **settings).eval()
    cached = Distillation(student, kind, CachedTeacher(), **settings).eval()
    batch = taught.batch([(0, row) for row in range(0, 90, 7)])

    def gradients(objective: Distillation) -> tuple[dict[str, float], torch.Tensor]:
        student.zero_grad()
        sums = objective(batch)
        sum(objective.weights[term] * sums[term] for term in sums).backward()
        flat = torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None])
        return {term: value.item() for term, value in sums.items()}, flat

    (a, grad_a), (b, grad_b) = gradients(online), gradients(cached)
    assert a == pytest.approx(b, rel=1e-5)
    assert (grad_a - grad_b).norm() < 1e-5 * grad_a.norm()
