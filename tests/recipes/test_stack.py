"""Adapters trained together on one base are those that training each alone makes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from answers import make_answers_task
from decoders import make_decoder
from processes import STAGE_3, finish, start
from safetensors.torch import load_file
from this_process import own_environment
from torch import nn
from worlds import make_base, make_labels_task, make_tagged_task, make_task

from recyclable.adapters.stacked import Rows
from recyclable.adapters.stacked import stack as stacked
from recyclable.api import stack, tune
from recyclable.data.token_rows import padding
from recyclable.errors import InputError, RunError
from recyclable.models.tasks import task_model
from recyclable.objectives.of_task import task_objective
from recyclable.objectives.stacked import StackedTasks
from recyclable.recipes.stack import RESULT
from recyclable.recipes.stack_settings import read_stack_settings, require_ds_config
from recyclable.tasks.parts.task import Task, load_task
from recyclable.tasks.parts.task_data import task_data
from recyclable.training import best, profiling
from recyclable.training.checkpoint import choosing
from recyclable.training.checkpoint.record import read_record, write_record
from recyclable.training.optimizer import build_optimizer, learning_rate
from recyclable.training.stacked_run import StackedRun
from recyclable.training.stacked_steps import OwnRuns
from recyclable.weights.base import Base
from recyclable.weights.manifest import ADAPTER, MANIFEST, read_manifest
from recyclable.weights.reader import Reader
from recyclable.weights.sources import fill

SHARED: dict[str, Any] = {
    "max_steps": 6,
    "learning_rate": 1e-2,
    "train_batch_size": 8,
    "eval_every": 3,
    "max_length": 32,
}
RUNS: dict[str, dict[str, Any]] = {
    "plain": {"seed": 1},
    "narrow": {"seed": 2, "lora_r": 4, "train_batch_size": 6, "max_steps": 5, "max_length": 12},
    "places": {"seed": 3, "target_modules": ["query", "value", "dense"], "learning_rate": 3e-3, "use_rslora": True},
    "stops": {"seed": 5, "eval_every": 2, "early_stopping_patience": 1, "early_stopping_threshold": 1.0},
    "grouped": {"seed": 4, "group_by_length": True, "shots": 4, "max_grad_norm": 0.01, "lora_alpha": 64},
}
TOLERANCE = 1e-5


@pytest.fixture(scope="module", autouse=True)
def environment() -> Iterator[None]:
    with own_environment():
        yield


class World:
    """A base, its tasks, and stacks of runs of them beside the same runs alone."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.base = make_base(folder / "base")
        self.task = make_task(folder / "task")

    def settings(self, out: str, runs: dict[str, dict[str, Any]], **more: Any) -> dict[str, Any]:
        told = {"base": str(self.base), "dropout": 0.0, "save_every": 0, "out": str(self.folder / out)}
        return {**told, "shared": {**SHARED, "task": str(self.task)}, "runs": runs, **more}

    def alone(self, runs: dict[str, dict[str, Any]], base: Path | None = None) -> Path:
        """Each run by itself."""
        out = self.folder / "alone"
        for name, own in runs.items():
            if not (out / name / MANIFEST).is_file():
                given = {"base": str(base or self.base), "task": str(self.task), "dropout": 0.0, "save_every": 0}
                tune(tuning="lora", out=str(out / name), **{**given, **SHARED, **own})
        return out


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


def require_same(found: Path, alone: Path, runs: dict[str, Any]) -> None:
    for name in runs:
        own, expected = (load_file(folder / name / ADAPTER) for folder in (found, alone))
        assert own.keys() == expected.keys() and len(own) >= 4
        for tensor, values in expected.items():
            assert own[tensor].shape == values.shape
            assert torch.allclose(own[tensor], values, rtol=TOLERANCE, atol=TOLERANCE), (name, tensor)
        told, other = (read_manifest(folder / name) for folder in (found, alone))
        assert (told.tuning, told.task, told.base, told.kind) == (other.tuning, other.task, other.base, other.kind)
        for about in ("best_step", "examples", "stopped_early_at"):
            assert told.metrics.get(about) == other.metrics.get(about)
        for split in ("dev", "test"):
            scores, expected_scores = (dict(manifest.metrics[split]) for manifest in (told, other))
            for each in (scores, expected_scores):  # exp(- log_likelihood), which makes more of a difference
                each.pop("perplexity", None)
            assert scores == pytest.approx(expected_scores, rel=TOLERANCE, abs=TOLERANCE)
        assert [row["step"] for row in told.history] == [row["step"] for row in other.history]


def test_adapters_of_other_ranks_lengths_rates_and_places_are_each_as_alone(world: World) -> None:
    metrics = stack(**world.settings("together", RUNS))
    alone = world.alone(RUNS)
    require_same(world.folder / "together", alone, RUNS)
    assert list(metrics) == list(RUNS)
    assert {name: of["stopped_early_at"] for name, of in metrics.items() if "stopped_early_at" in of} == {"stops": 2}
    moved = [load_file(alone / name / ADAPTER) for name in ("plain", "narrow")]
    assert not torch.equal(*(next(v for k, v in each.items() if "lora_A" in k)[:4] for each in moved)), "they differ"


def test_passes_of_a_few_rows_change_nothing(world: World, tmp_path: Path) -> None:
    (ds_config := tmp_path / "ds.json").write_text(json.dumps({"train_micro_batch_size_per_gpu": 5}))
    stack(deepspeed_config=str(ds_config), **world.settings("few", RUNS))
    require_same(world.folder / "few", world.alone(RUNS), RUNS)


def test_tasks_of_one_kind_of_model_go_together_whatever_their_classes(world: World) -> None:
    several = str(make_labels_task(world.folder / "labels"))
    runs = {"one": {"seed": 1}, "many": {"seed": 1, "task": several}}
    stack(**world.settings("kinds", runs))
    require_same(world.folder / "kinds", world.alone(runs), runs)


def test_tags_of_texts_of_other_lengths(world: World) -> None:
    tagged = str(make_tagged_task(world.folder / "tagged"))
    runs = {"tags": {"seed": 1, "task": tagged}, "short": {"seed": 2, "task": tagged, "max_length": 10}}
    stack(**world.settings("tagging", runs))
    require_same(world.folder / "tagging", world.alone(runs), runs)


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_answers_in_text(world: World, family: str) -> None:
    base = make_decoder(world.folder / family, family)
    task = str(make_answers_task(world.folder / f"answers-{family}", {"train": 24, "dev": 6, "test": 6}))
    steady = {"task": task, "learning_rate": 1e-3, "adam_epsilon": 1e-3}  # else much is made of how gradients round
    runs = {f"{family}-{seed}": {**steady, "seed": seed, "lora_r": 2 * seed} for seed in (1, 2)}
    stack(**{**world.settings(f"text-{family}", runs), "base": str(base)})
    require_same(world.folder / f"text-{family}", world.alone(runs, base), runs)


@pytest.mark.parametrize("stopped", [3, 5])
def test_a_stack_that_was_interrupted_goes_on_as_if_nothing_had_been(
    world: World, stopped: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = world.settings(f"stopped-{stopped}", RUNS, save_every=2)
    original = OwnRuns.step

    def step(self: OwnRuns, number: int) -> None:
        if number == stopped:
            raise KeyboardInterrupt
        original(self, number)

    with monkeypatch.context() as patched:
        patched.setattr(OwnRuns, "step", step)
        with pytest.raises(KeyboardInterrupt):
            stack(**settings)
    newest = world.folder / f"stopped-{stopped}" / "checkpoints" / f"step-{stopped // 2 * 2:08d}"
    whole = read_record(newest)
    write_record(newest, replace(whole, runs={"other": whole.progress}))
    with pytest.raises(InputError, match=r"tells of the runs \['other'\], expected each of the stack's"):
        stack(resume=True, **settings)
    write_record(newest, whole)
    done: list[int] = []
    monkeypatch.setattr(OwnRuns, "step", lambda self, number: (done.append(number), original(self, number)))
    stack(resume=True, **settings)
    assert done[0] == stopped // 2 * 2
    require_same(world.folder / f"stopped-{stopped}", world.alone(RUNS), RUNS)


def test_a_stack_ends_when_all_have_stopped_and_each_has_left_where_it_would_have_alone(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    longer = {"seed": 6, "eval_every": 1, "early_stopping_patience": 3, "early_stopping_threshold": 1.0}
    runs = {"stops": RUNS["stops"], "longer": longer}
    alive: list[list[str]] = []
    original = OwnRuns.step

    def step(self: OwnRuns, number: int) -> None:
        alive.append([run.name for run in self.runs.values() if run.live])
        original(self, number)

    monkeypatch.setattr(OwnRuns, "step", step)
    stack(**world.settings("all-stop", runs))
    assert alive == [["stops", "longer"], ["stops", "longer"], ["longer"]]
    require_same(world.folder / "all-stop", world.alone(runs), runs)


def test_a_run_whose_numbers_fail_is_given_up_and_the_others_are_saved(world: World) -> None:
    runs = {"plain": RUNS["plain"], "wild": {"seed": 1, "learning_rate": 1e30, "max_grad_norm": 0}}
    settings = world.settings("wild", runs, save_every=4)
    with pytest.raises(RunError, match=r"1 of 2 runs were given up: wild: (the loss is|predictions: )"):
        stack(**settings)
    with pytest.raises(RunError, match=r"1 of 2 runs were given up: wild: it was given up before, after step "):
        stack(resume=True, **settings)
    require_same(world.folder / "wild", world.alone(RUNS), {"plain": {}})
    assert not (world.folder / "wild" / "wild" / MANIFEST).exists()


def test_in_fp64_each_step_is_that_of_the_run_alone(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Adam makes much of how gradients round; where they hardly round, nothing else is left to differ."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # losses are in fp32 whatever the model is in
    runs = {name: own for name, own in RUNS.items() if name != "stops"}
    settings = read_stack_settings(
        world.settings("fp64", {name: {**own, "max_steps": 30} for name, own in runs.items()}), ""
    )
    base = Base(world.base)
    tunes, reader, task = settings.tunes(), Reader.of(base), load_task(world.task)

    def made(name: str) -> StackedRun:
        tuned = tunes[name]
        tuned.out.mkdir(parents=True, exist_ok=True)
        model = tuned.attach(task_model(base, task, tuned.seed, tuned.dropout), "SEQ_CLS", tuned.seed)
        return StackedRun(name, tuned, task_data(tuned, task, reader), fill(model).double())

    rows, alone, together = Rows(), [made(name) for name in runs], {n: made(name) for n, name in enumerate(runs)}
    host = stacked(made("plain").model, [run.model for run in together.values()], rows)
    kinds, classes = [task.kind] * len(runs), [len(task.labels)] * len(runs)
    tasks = StackedTasks(host, rows, kinds, classes, padding(reader.tokenizer()))
    steps = OwnRuns(tasks, tasks, "cpu", together, {})
    for step in range(30):
        steps.step(step)
    for run, other in zip(alone, together.values(), strict=True):
        train_alone(run, task)
        for name, values in run.trained.items():
            difference = (other.trained[name] - values).abs().max() / values.abs().max()
            assert values.dtype == torch.float64 and difference < 1e-10, (run.name, name)


def train_alone(run: StackedRun, task: Task) -> None:
    """The arithmetic of `tune`, whatever the precision."""
    objective, optimizer, order = (
        task_objective(run.model, task.kind),
        build_optimizer(run.model, run.settings),
        run.order(),
    )
    run.model.train()
    for step in range(run.settings.max_steps):
        batch = run.data.train.batch(order.step(step))
        (objective.sums(batch)["task"] / objective.counts(batch)["task"]).backward()
        nn.utils.clip_grad_norm_(run.trained.values(), run.settings.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, run.settings)
        optimizer.step()
        optimizer.zero_grad()


def test_ranks_and_stages_change_nothing(world: World) -> None:
    folder = world.folder / "ranks"
    stages = {stage: {"zero_optimization": {"stage": stage, **(STAGE_3 if stage == 3 else {})}} for stage in (0, 2, 3)}
    runs = [
        {"verb": "stack", "config": world.settings(f"stage-{stage}", RUNS, save_every=2), "ds_config": ds_config}
        for stage, ds_config in stages.items()
    ]
    finish(start(folder, runs, nproc=2), folder)
    for stage in stages:
        require_same(world.folder / f"stage-{stage}", world.alone(RUNS), RUNS)


OF_A_STACK = (choosing.FOLDER, profiling.FOLDER, "run.json", RESULT, best.tensors_file(Path(), 3).name)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"runs": {"a": {"tuning": "ia3"}}}, "expected 'lora' in a stack"),
        ({"runs": {"a": {"use_dora": True}}}, "expected 'lora' in a stack"),
        ({"runs": {"../a": {}}}, "expected names of directories"),
        ({"runs": {" ": {}}}, "expected names of directories"),
        ({"runs": {".lock": {}}}, "expected names of directories"),
        ({"runs": {"ä" * 128: {}}}, "expected names of directories"),
        *(({"runs": {name: {}}}, "which a stack has in `out` itself") for name in OF_A_STACK),
        ({"runs": {"a": {"base": "elsewhere"}}}, "base is given, but it is the whole stack's"),
        ({"runs": {"a": {"logits": "bf16"}}}, "runs.a: logits is bf16, but those of a stack are in fp32: remove it"),
        ({"runs": {"a": {"lora_rank": 4}}}, "lora_rank"),
        ({"runs": {}}, "runs"),
    ],
)
def test_what_cannot_be_stacked_is_refused_in_one_line(world: World, change: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError) as refused:
        stack(**world.settings("refused", **{"runs": {}, **change}))
    assert said in str(refused.value) and "\n" not in str(refused.value)
    assert not (world.folder / "refused").exists()


@pytest.mark.parametrize(
    "ds_config",
    [
        {},
        {"tensorboard": {"enabled": False}, "wandb": {}, "train_micro_batch_size_per_gpu": 7},
        {"activation_checkpointing": {"cpu_checkpointing": True}, "zero_optimization": {"stage": 3}},
    ],
)
def test_a_ds_config_that_a_stack_follows(ds_config: dict[str, Any]) -> None:
    before = json.dumps(ds_config)
    require_ds_config(ds_config, 2, None)
    require_ds_config(ds_config, 2, True)
    assert json.dumps(ds_config) == before


@pytest.mark.parametrize(
    ("ds_config", "said"),
    [
        ({"train_micro_batch_size_per_gpu": 0}, "train_micro_batch_size_per_gpu is 0, expected a whole number"),
        ({"train_micro_batch_size_per_gpu": -1}, "train_micro_batch_size_per_gpu is -1, expected a whole number"),
        ({"train_micro_batch_size_per_gpu": "all"}, "train_micro_batch_size_per_gpu is 'all', expected a whole number"),
        ({"gradient_clipping": 1.0}, "gradient_clipping is given, but in a stack it is each run's own"),
        ({"train_batch_size": 8}, "train_batch_size is given, but in a stack it is each run's own"),
        ({"csv_monitor": {"enabled": True}}, "csv_monitor is given, but a stack's runs write tensorboard/ alone"),
        ({"tensorboard": 5}, "tensorboard is given, but a stack's runs write tensorboard/ alone"),
        ({"activation_checkpointing": {}}, "gradient_checkpointing in the run config is false"),
        ({"zero_optimization": []}, "zero_optimization is []"),
        ({"fp16": 5}, "fp16 is 5"),
    ],
)
def test_a_ds_config_that_a_stack_cannot_follow_is_refused_in_one_line(
    world: World, ds_config: dict[str, Any], said: str, tmp_path: Path
) -> None:
    (file := tmp_path / "ds.json").write_text(json.dumps(ds_config))
    settings = world.settings("refused", {"a": {}}, gradient_checkpointing=False)
    with pytest.raises(InputError) as refused:
        stack(deepspeed_config=str(file), **settings)
    assert said in str(refused.value) and "\n" not in str(refused.value)
    assert not (world.folder / "refused").exists()
