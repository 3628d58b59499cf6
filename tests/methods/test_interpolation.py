"""Interpolation distillation is, at every ZeRO stage, what plain PyTorch computes on whole interpolated state dicts."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from plain import (
    ADAPTER_RATE,
    ALPHA,
    BATCH,
    BETA,
    COMMON,
    LENGTH,
    LOSS_TOLERANCE,
    POINTS,
    RATE,
    SEED,
    SHARE,
    TEMPERATURE,
    WARMUP,
    WEIGHT_TOLERANCE,
    at,
    largest_difference,
    plain_training,
    saved_tensors,
    short,
)
from processes import STAGE_3, finish, outcome, scalars, start
from torch import nn
from worlds import Chain, make_outdated

from recyclable import distributed
from recyclable.carrying.carried import Carried
from recyclable.config.settings import TrainSettings
from recyclable.data.examples import LabelledTexts
from recyclable.data.order import Order
from recyclable.errors import InputError
from recyclable.models.tasks import outdated_model, task_model
from recyclable.objectives import weight_path
from recyclable.objectives.interpolation import Interpolation, Places
from recyclable.objectives.teachers import OnlineTeacher
from recyclable.tasks.classification import Classification
from recyclable.tasks.parts.task import load_task
from recyclable.training.engine import engine_for
from recyclable.tunings import TUNINGS
from recyclable.weights.adapted import AdaptedWeights
from recyclable.weights.base import Base
from recyclable.weights.manifest import read_manifest
from recyclable.weights.sources import fill
from recyclable.weights.vocabulary import load_tokenizer

STEPS = 6
SIZES = {"full": {}, "lora": {"lora_r": 4}, "bottleneck": {"bottleneck_size": 8}}
KINDS = tuple(SIZES)


class World(Chain):
    """Where the small world of this file lies, and runs in it."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        make_outdated(self.base, self.task, folder / "full")
        make_outdated(self.base, self.task, folder / "second", seed=33)

    def tune(self, kind: str) -> dict[str, Any]:
        """A run that leaves adapter weights of the old base behind, of some use on the new one and to be improved."""
        settings = {"tuning": kind, **SIZES[kind], "learning_rate": 2e-2}
        settings["max_steps"] = {"lora": 8, "bottleneck": 20}[kind]
        return self._run("tune", self.folder / kind, base=self.base, **settings)

    def recycle(self, out: str, kind: str = "full", stage: int = 2, micro: int = 12, **settings: Any) -> dict[str, Any]:
        how = {name: settings.pop(name) for name in ("raise_at", "resume", "bf16") if name in settings}
        shared = {
            "base": self.upgraded,
            "old_base": self.base,
            "weights": self.folder / kind,
            "method": "interpolate",
            "task_share": SHARE,
            "interpolation_points": None if "interpolation_draws" in settings else list(POINTS),
            "alpha": ALPHA,
            "beta": BETA,
            "temperature": TEMPERATURE,
            "learning_rate": RATE if kind == "full" else ADAPTER_RATE,
        }
        zero = {"stage": stage, **(STAGE_3 if stage == 3 else {})}
        ds_config = {"train_micro_batch_size_per_gpu": micro, "zero_optimization": zero}
        if how.pop("bf16", False):
            ds_config["bf16"] = {"enabled": True}
        run = self._run("recycle", self.folder / out, **{**shared, **settings})
        return {**run, "ds_config": ds_config, **how}

    def _run(self, verb: str, out: Path, **settings: Any) -> dict[str, Any]:
        config = {**COMMON, "max_steps": STEPS, "eval_every": STEPS, "task": str(self.task), "out": out, **settings}
        return {"verb": verb, "config": config, "ds_config": {}}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("interpolation"))


# ---- the oracle --------------------------------------------------------------------------------------------------


def soft_loss(student: Any, teacher: Any, alpha: float, beta: float) -> torch.Tensor:
    p, q = (teacher.logits / TEMPERATURE).softmax(-1), (student.logits / TEMPERATURE).softmax(-1)
    kl = (p * (p / q).log()).sum() / len(p)
    states = [torch.stack([h[:, 0] for h in out.hidden_states[:-1]]) for out in (student, teacher)]
    return alpha * TEMPERATURE**2 * kl + beta * 0.5 * nn.functional.mse_loss(*states)


def oracle_loss(
    student: nn.Module, fixed: list[nn.Module], batch: dict[str, torch.Tensor], points: dict[float, tuple[float, float]]
) -> torch.Tensor:
    """`points`: x -> (alpha_x, beta_x); the teacher is the first fixed model."""
    with torch.no_grad():
        teacher = at(0.0, student, fixed[0], batch)
    own = at(1.0, student, fixed[0], batch)
    soft = soft_loss(own, teacher, *points[1.0])
    for model in fixed:
        for x, weights in points.items():
            soft = soft + soft_loss(at(x, student, model, batch), teacher, *weights) * (x < 1)
    return SHARE * nn.functional.cross_entropy(own.logits, batch["labels"]) + (1 - SHARE) * soft


# ---- one batch, in this process ----------------------------------------------------------------------------------


def ends(world: World, kind: str) -> list[nn.Module]:
    """A student and two fixed models of the same structure with weights of their own, dropout off."""
    task, made = load_task(str(world.task)), []
    for i, folder in enumerate((world.upgraded, world.base, world.base)):
        model = task_model(Base(folder), task, SEED + i, 0.0)
        model = fill(TUNINGS.get(kind)(**SIZES[kind]).attach(model, "SEQ_CLS", SEED + i))
        noise = torch.Generator().manual_seed(i)
        for parameter in model.parameters():  # an adapter just drawn changes nothing
            if parameter.requires_grad:
                parameter.data += 0.05 * torch.randn(parameter.shape, generator=noise)
        made.append(model)
    return made


def first_batch(world: World, folder: Path) -> dict[str, torch.Tensor]:
    task = load_task(str(world.task))
    return LabelledTexts(task.splits["train"], load_tokenizer(folder), LENGTH).batch([(0, i) for i in range(9)])


def objective(student: nn.Module, *fixed: nn.Module, **settings: Any) -> Interpolation:
    teacher, second = (*fixed, None)[:2]
    shared = {"share": SHARE, "temperature": TEMPERATURE, "places": Places(POINTS)}
    weights = {"alphas": [ALPHA] * 3, "betas": [BETA] * 3}
    told = OnlineTeacher(teacher, Classification(), with_states=any(settings.get("betas", weights["betas"])))
    return Interpolation(student, Classification(), told, second=second, **{**shared, **weights, **settings})


def backward(made: Interpolation, batch: dict[str, torch.Tensor], step: int = 0) -> float:
    """Loss of all passes, each with a backward of its own."""
    total, counts = 0.0, made.counts(batch)
    for of_pass in made.passes(step):
        loss = sum(made.weights[term] * value / counts[term] for term, value in made(batch, **of_pass).items())
        loss.backward()
        total += loss.item()
    return total


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ways", [1, 2])
def test_loss_and_gradients_are_those_of_interpolated_state_dicts(world: World, kind: str, ways: int) -> None:
    student, *fixed = ends(world, kind)
    fixed, batch = fixed[:ways], first_batch(world, world.base)
    plain = copy.deepcopy(student)
    weights = {0.3: (0.5, 2.0), 0.7: (0.8, 0.0), 1.0: (1.0, 3.0)}
    expected = oracle_loss(plain, fixed, batch, weights)
    expected.backward()

    alphas, betas = zip(*weights.values(), strict=True)
    made = objective(student, *fixed, alphas=alphas, betas=betas).eval()
    assert backward(made, batch) == pytest.approx(expected.item(), rel=1e-5)
    wanted, found = gradients(plain), gradients(student)
    assert wanted.keys() == found.keys() and len(found) == sum(p.requires_grad for p in student.parameters())
    for name, gradient in wanted.items():
        assert (found[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-8, name
    assert all(p.grad is None for model in fixed for p in model.parameters())


def test_the_points_differ_from_the_student_and_the_student_stays_itself(world: World) -> None:
    """So that the comparison above would notice points that are not mixed."""
    student, teacher, _ = ends(world, "lora")
    batch, plain = first_batch(world, world.base), copy.deepcopy(student)
    made = objective(student, teacher).eval()
    with torch.no_grad():
        sums = {term: value for of_pass in made.passes(0) for term, value in made(batch, **of_pass).items()}
        assert sums.keys() == made.weights.keys()
        assert sums["kd_1"] < 0.9 * sums["kd_2"] and sums["kd_2"] < 0.9 * sums["kd"]
        # of the last layer it computes fewer rows, which rounds otherwise
        logits = at(1.0, plain, teacher, batch).logits
        torch.testing.assert_close(made(batch, predict=True), logits, atol=1e-6, rtol=1e-6)
    assert [n for n, _ in student.named_parameters()] == [n for n, _ in plain.named_parameters()]
    assert student.state_dict().keys() == plain.state_dict().keys()


def test_mixed_weights_do_not_outlive_their_modules_forward(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are mixed again for the gradient: under ZeRO-3 no rank holds a whole mixed model."""
    student, teacher, _ = ends(world, "full")
    made, batch, mixed = objective(student, teacher).eval(), first_batch(world, world.base), []
    lerp = torch.lerp

    def remembered(*args: Any) -> torch.Tensor:
        tensor = lerp(*args)
        mixed.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(weight_path.torch, "lerp", remembered)
    sums = made(batch, **made.passes(0)[0])
    assert not mixed, "at x = 1 there is nothing to mix"
    sums = made(batch, **made.passes(0)[1])
    in_forward = len(mixed)
    assert in_forward == len(list(student.parameters()))
    assert not [ref for ref in mixed if ref() is not None]
    sum(sums.values()).backward()
    assert len(mixed) > in_forward
    assert not [ref for ref in mixed if ref() is not None]


def test_a_weight_used_outside_of_its_module_is_refused(world: World) -> None:
    student, teacher, _ = ends(world, "full")
    for model in (student, teacher):
        model.classifier = _Borrower(model.classifier)
    made, batch = objective(student, teacher), first_batch(world, world.base)
    made(batch, **made.passes(0)[0])
    with pytest.raises(InputError, match=r"classifier\.linear cannot be interpolated: Linear does not use"):
        made(batch, **made.passes(0)[1])


class _Borrower(nn.Module):
    """Uses another module's weights without calling it."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.linear.weight, self.linear.bias)


def test_drawn_points_depend_on_seed_and_step_alone_and_keep_their_margin() -> None:
    places = Places(draws=500, margin=0.2, seed=3)
    first = places.at(4)
    assert len(places) == len(first) == 500 and list(first) == sorted(first)
    assert 0.2 <= first[0] < 0.22 and 0.78 < first[-1] <= 0.8
    torch.manual_seed(9)
    assert Places(draws=500, margin=0.2, seed=3).at(4) == first
    assert places.at(5) != first and Places(draws=500, margin=0.2, seed=4).at(4) != first


def test_zero_3_keeps_neither_end_nor_a_mixed_weight_whole(world: World) -> None:
    student, teacher, _ = ends(world, "full")
    made = objective(student, teacher)
    examples = LabelledTexts(load_task(str(world.task)).splits["train"], load_tokenizer(world.base), LENGTH)
    settings = TrainSettings(**{**COMMON, "out": world.folder / "engine", "train_batch_size": 4})
    on_cpu = {"offload_optimizer": {"device": "cpu"}}  # else one rank has nothing to share out
    ds_config = {"zero_optimization": {"stage": 3, **STAGE_3, **on_cpu}, "train_micro_batch_size_per_gpu": 4}
    distributed.init()
    try:
        with engine_for(made, settings, ds_config, settings.out) as engine:
            for step in range(3):
                batch = examples.batch(Order(90, 4, SEED).step(step))
                for of_pass in made.passes(step):
                    engine.backward(sum(engine(batch, **of_pass).values()))
                    engine.step()
            assert engine.global_steps == 3, "a step is one step whatever the number of passes"
            held = [name for name, p in made.named_parameters() if p.numel() > 0]
            assert not held
            assert not [n for n, m in student.named_modules() for p in m._parameters if p in vars(m)]
    finally:
        distributed.shutdown()


# ---- training on ranks -------------------------------------------------------------------------------------------

ALL = (0, 1, 2, 3)
DRAWS = {"interpolation_draws": 2, "interpolation_margin": 0.1}
# What is trained -> settings; micro-batch per rank on 1 and 2 ranks (less than 12 / ranks: accumulation), ZeRO stages.
PLAN: dict[str, tuple[dict[str, Any], dict[int, tuple[int, tuple[int, ...]]]]] = {
    "full": ({}, {1: (12, ALL), 2: (3, ALL)}),
    "full_fresh_drawn": ({"start": "fresh", **DRAWS}, {1: (6, (2,)), 2: (6, (3,))}),
    "lora": ({}, {1: (4, (3,)), 2: (6, (0,))}),
    "bottleneck": ({}, {2: (6, (1, 3))}),
}
RUNS = [(name, n, stage) for n in (1, 2) for name, (_, at) in PLAN.items() if n in at for stage in at[n][1]]
SECOND = {"second_weights": "second", "second_base": "base"}
RAISE_AT = 3


def out_of(name: str, ranks: int, stage: int) -> str:
    return f"{name}-{ranks}-{stage}"


@pytest.fixture(scope="module")
def trained(world: World) -> World:
    """The world after all runs: in one process without a launcher, and on two ranks under it."""
    for ranks in (1, 2):
        runs = [world.tune(kind) for kind in KINDS[1:]] if ranks == 1 else []
        for name, n, stage in RUNS:
            if n == ranks:
                settings, micro = PLAN[name][0], PLAN[name][1][n][0]
                runs.append(world.recycle(out_of(name, n, stage), name.split("_")[0], stage, micro, **settings))
        resumed = {"micro": 3, "save_every": 2, "dropout": 0.1, "stage": 2 if ranks == 1 else 3, **DRAWS}
        runs.append(world.recycle(f"uninterrupted-{ranks}", **resumed))
        runs.append(world.recycle(f"resumed-{ranks}", **resumed, raise_at=RAISE_AT))
        runs.append(world.recycle(f"resumed-{ranks}", **resumed, resume=True))
        if ranks == 2:
            second = {name: world.folder / folder for name, folder in SECOND.items()}
            runs.append(world.recycle("second-path", stage=3, micro=3, **second))
            runs.append(world.recycle("bf16", stage=3, micro=3, bf16=True))
        folder = world.folder / f"ranks-{ranks}"
        finish(start(folder, runs, nproc=ranks if ranks > 1 else None), folder)
    return world


class Expected:
    """Plain training of one run of the plan: its losses and the trained values at the end."""

    def __init__(self, world: World, kind: str, *, fresh: bool = False, draws: bool = False, second: bool = False):
        task = load_task(str(world.task))
        examples = LabelledTexts(task.splits["train"], load_tokenizer(world.upgraded), LENGTH)
        order, weights = Order(len(examples), BATCH, SEED), AdaptedWeights(world.folder / kind)
        old, new = Base(world.base), Base(world.upgraded)
        fixed = [fill(outdated_model(Carried(weights, old, old), task, SEED))]
        if second:
            other = AdaptedWeights(world.folder / "second")
            fixed.append(fill(outdated_model(Carried(other, old, old), task, SEED)))
        student = task_model(new, task, SEED)
        student = fill(student if fresh else outdated_model(Carried(weights, old, new), task, SEED))
        names = [name for name, parameter in student.named_parameters() if parameter.requires_grad]
        for model in fixed:
            model.eval().requires_grad_(False)

        def loss_of(step: int) -> torch.Tensor:
            xs = Places(draws=2, margin=0.1, seed=SEED).at(step) if draws else POINTS
            points = dict.fromkeys((*xs, 1.0), (ALPHA, BETA))
            return oracle_loss(student, fixed, examples.batch(order.step(step)), points)

        rate = RATE if kind == "full" else ADAPTER_RATE
        self.losses = plain_training(student, names, loss_of, rate, WARMUP, STEPS)
        self.tensors = short({name: p for name, p in student.named_parameters() if name in names})


@pytest.fixture(scope="module")
def oracle(trained: World) -> Callable[..., Expected]:
    known: dict[str, Expected] = {}

    def expected(name: str) -> Expected:
        if name not in known:
            kind = {"draws": "drawn" in name, "fresh": "fresh" in name, "second": name == "second"}
            known[name] = Expected(trained, "full" if name == "second" else name.split("_")[0], **kind)
        return known[name]

    return expected


def assert_equal(world: World, out: str, expected: Expected) -> None:
    assert outcome(world.folder / out) == {}
    losses = scalars(world.folder / out, "train/loss")
    assert losses == pytest.approx(expected.losses, rel=LOSS_TOLERANCE)
    assert read_manifest(world.folder / out).metrics["best_step"] == STEPS, "the oracle has the last step's weights"
    assert largest_difference(saved_tensors(world.folder / out, world.upgraded), expected.tensors) <= WEIGHT_TOLERANCE


@pytest.mark.parametrize(("name", "ranks", "stage"), RUNS)
def test_training_is_that_of_plain_pytorch(trained: World, oracle: Callable, name: str, ranks: int, stage: int) -> None:
    assert_equal(trained, out_of(name, ranks, stage), oracle(name))


def test_a_second_fixed_model_adds_a_second_path(trained: World, oracle: Callable) -> None:
    assert_equal(trained, "second-path", oracle("second"))
    assert oracle("second").losses[0] > 1.05 * oracle("full").losses[0]


def test_bf16_follows(trained: World, oracle: Callable) -> None:
    assert outcome(trained.folder / "bf16") == {}
    assert scalars(trained.folder / "bf16", "train/loss") == pytest.approx(oracle("full").losses, rel=0.05)


def test_the_losses_move_by_far_more_than_the_tolerance(oracle: Callable) -> None:
    for name in PLAN:
        losses = oracle(name).losses
        assert losses[-1] < 0.95 * losses[0], name


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_resumed_run_ends_with_the_same_bits(trained: World, ranks: int) -> None:
    whole, resumed = trained.folder / f"uninterrupted-{ranks}", trained.folder / f"resumed-{ranks}"
    assert outcome(whole) == outcome(resumed) == {}
    for name in ("delta.safetensors", "head.safetensors"):
        assert (whole / name).read_bytes() == (resumed / name).read_bytes()
    assert scalars(whole, "train/loss")[RAISE_AT:] == scalars_after(resumed, RAISE_AT)


def scalars_after(out: Path, step: int) -> list[float]:
    """Of a run that was interrupted and went on: what it did last of each step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(out / "tensorboard")).Reload().Scalars("train/loss")
    return [value for at, value in sorted({event.step: event.value for event in events}.items()) if at > step]


def test_only_the_trainable_end_is_saved(trained: World) -> None:
    folder = trained.folder / out_of("full", 2, 3)
    assert {path.name for path in folder.iterdir()} == {
        *("delta.safetensors", "head.safetensors", "manifest.json", "run.json", "tensorboard")
    }
    tensors = set(saved_tensors(folder, trained.upgraded))
    assert tensors == set(saved_tensors(trained.folder / "full", trained.base))
