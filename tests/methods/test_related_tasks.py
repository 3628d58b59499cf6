"""Weights of another task: all of them where the labels are the same, all but the head where they are not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from plain import ALPHA, BETA, COMMON, LENGTH, POINTS, SEED, SHARE, TEMPERATURE, at
from processes import scalars
from safetensors.torch import load_file
from torch import nn
from worlds import Chain, make_base, make_outdated, make_task, rewrite_rows, write_config

from recyclable.carrying.carried import Carried
from recyclable.cli import main
from recyclable.data.examples import LabelledTexts
from recyclable.data.order import Order
from recyclable.methods import METHODS
from recyclable.models.tasks import outdated_model, task_model
from recyclable.tasks.parts.task import load_task
from recyclable.weights.adapted import AdaptedWeights
from recyclable.weights.base import Base
from recyclable.weights.manifest import read_manifest
from recyclable.weights.sources import fill
from recyclable.weights.vocabulary import load_tokenizer

NAMES = {"left": "up", "middle": "down", "right": "up"}
TRAINED = ("scratch", "init", "distill", "both", "interpolate")
TWO_STEPS = {"max_steps": 2, "eval_every": 2, "train_batch_size": 12}


class World(Chain):
    """A base, its upgrade, weights tuned for three labels, and two other tasks: of the same labels, and of two."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.similar = make_task(folder / "similar", seed=44)
        self.other = make_task(folder / "other", seed=55)
        rewrite_rows(self.other, lambda row: row.update(label=NAMES[row["label"]]))
        self.full = make_outdated(self.base, self.task, folder / "full")
        self.lora = folder / "lora"
        settings = {"task": self.task, "tuning": "lora", "lora_r": 4, "learning_rate": 2e-2, "max_steps": 12}
        assert self.run("tune", self.lora, base=self.base, **{**COMMON, **TWO_STEPS, **settings})[0] == 0

    def run(self, verb: str, out: Path, *options: str, **settings: Any) -> tuple[int, Path]:
        """Exit status of `recyclable verb`, and where its result is."""
        file = write_config(self.folder / f"{out.name}.yaml", {"out": out, **settings})
        return main([verb, str(file), *options]), out

    def recycle(self, out: str, task: Path, weights: Path, **settings: Any) -> tuple[int, Path]:
        """`method` is among the settings; it is given those of the shared ones that it reads."""
        shared = {
            **COMMON,
            **TWO_STEPS,
            "base": self.upgraded,
            "old_base": self.base,
            "task_share": SHARE,
            "interpolation_points": list(POINTS),
            "alpha": ALPHA,
            "beta": BETA,
            "temperature": TEMPERATURE,
            "learning_rate": 1e-3,
        }
        read = METHODS.get(settings["method"]).model_fields
        given = {name: value for name, value in shared.items() if name in read}
        return self.run("recycle", self.folder / out, weights=weights, task=task, **{**given, **settings})


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("related"))


def start(world: World, weights: Path) -> nn.Module:
    """A student for two labels that starts with weights for three."""
    carried = Carried(AdaptedWeights(weights), Base(world.base), Base(world.upgraded))
    return fill(outdated_model(carried, load_task(world.other), SEED, 0.0, head=False)).eval()


def test_a_delta_goes_over_with_its_pooler_and_the_head_is_fresh(world: World) -> None:
    found = {name.removeprefix("bert."): p.detach() for name, p in start(world, world.full).named_parameters()}
    base = Base(world.upgraded)
    for name, difference in load_file(world.full / "delta.safetensors").items():
        assert torch.allclose(found.pop(name), base[name] + difference), name
    old_head = load_file(world.full / "head.safetensors")
    for name in ("pooler.dense.weight", "pooler.dense.bias"):
        assert torch.equal(found.pop(name), old_head[name])
    fresh = fill(task_model(Base(world.upgraded), load_task(world.other), SEED, 0.0))
    assert found.keys() == {"classifier.weight", "classifier.bias"}
    assert torch.equal(found["classifier.weight"], fresh.classifier.weight) and found["classifier.bias"].shape == (2,)


def test_an_adapter_goes_over_with_its_pooler_and_the_head_is_fresh(world: World) -> None:
    model = start(world, world.lora)
    parameters = {name.replace(".default", ""): p.detach() for name, p in model.named_parameters()}
    fresh = fill(task_model(Base(world.upgraded), load_task(world.other), SEED, 0.0))
    for name, tensor in load_file(world.lora / "adapter_model.safetensors").items():
        place = name.replace("pooler.", "pooler.modules_to_save.")
        if ".classifier." in name:
            own = parameters[name.replace("classifier.", "classifier.modules_to_save.")]
            assert torch.equal(own, fresh.get_parameter(name.removeprefix("base_model.model.")))
        else:
            assert torch.equal(parameters[place], tensor), name
    assert any("lora_B" in name and p.abs().sum() > 0 for name, p in parameters.items())


@pytest.mark.parametrize("weights", ["full", "lora"])
@pytest.mark.parametrize("method", TRAINED)
def test_other_labels_are_told_and_recorded_and_no_logits_distilled(world, capsys, method, weights) -> None:
    tuned = getattr(world, weights)
    status, out = world.recycle(f"{method}-{weights}", world.other, tuned, method=method, related_task=True)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("notice: ")]
    hidden_alone = ", and only hidden states are distilled" if method in ("distill", "both", "interpolate") else ""
    assert status == 0
    assert said == [f"notice: {tuned} is for the labels of task: other gets a fresh head{hidden_alone}"]
    manifest = read_manifest(out)
    assert manifest.task["labels"] == ["down", "up"]
    origin = manifest.recycled_from
    assert (origin["task"], origin["labels"]) == ("task", ["left", "middle", "right"])
    assert origin["same_labels"] is False
    logged = {path for path in _tags(out) if path.startswith("train/") and path != "train/learning_rate"}
    points = {"train/patient", "train/patient_1", "train/patient_2"}
    soft = {"distill": {"train/patient"}, "both": {"train/patient"}, "interpolate": points}.get(method, set())
    assert logged - {"train/grad_norm"} == {"train/loss", "train/task"} | soft


def _tags(out: Path) -> list[str]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(out / "tensorboard")).Reload().Tags()["scalars"]


@pytest.mark.parametrize("weights", ["full", "lora"])
def test_the_first_loss_is_that_of_the_formula_without_its_kl_terms(world: World, weights: str) -> None:
    """And the head, which the teacher has not, is not interpolated."""
    task, three = load_task(world.other), load_task(world.task)
    examples = LabelledTexts(task.splits["train"], load_tokenizer(world.upgraded), LENGTH)
    batch = examples.batch(Order(len(examples), 12, SEED).step(0))
    old, opened = Base(world.base), AdaptedWeights(getattr(world, weights))
    teacher = fill(outdated_model(Carried(opened, old, old), three, SEED, 0.0)).eval()
    student = start(world, getattr(world, weights))
    path_end = start(world, getattr(world, weights))  # the teacher's weights, but for the head
    for name, parameter in path_end.named_parameters():
        if "classifier" not in name:
            parameter.data = teacher.get_parameter(name).detach()

    def patient(x: float) -> torch.Tensor:
        states = [at(x, student, path_end, batch).hidden_states, at(1, teacher, teacher, batch).hidden_states]
        return 0.5 * nn.functional.mse_loss(*(torch.stack([h[:, 0] for h in of[:-1]]) for of in states))

    with torch.no_grad():
        hard = nn.functional.cross_entropy(at(1, student, path_end, batch).logits, batch["labels"]).item()
        soft = {x: patient(x).item() for x in (*POINTS, 1.0)}
    expected = {
        "both": (1 - ALPHA) * hard + BETA * soft[1.0],
        "interpolate": SHARE * hard + (1 - SHARE) * BETA * sum(soft.values()),
    }
    for method, loss in expected.items():
        out = f"loss-{method}-{weights}"
        assert world.recycle(out, world.other, getattr(world, weights), method=method, related_task=True)[0] == 0
        assert scalars(world.folder / out, "train/loss")[0] == pytest.approx(loss, rel=1e-4)


def test_a_task_with_the_same_labels_gets_everything_without_asking(world: World, capsys) -> None:
    status, out = world.recycle("same-labels", world.similar, world.full, method="both")
    applied = world.recycle("same-labels-applied", world.similar, world.full, method="apply")[1]
    assert status == 0 and "notice: " not in capsys.readouterr().out
    origin = read_manifest(out).recycled_from
    assert origin["task"] == "task" and origin["same_labels"] is True
    assert read_manifest(out).history[0]["accuracy"] == read_manifest(applied).history[0]["accuracy"]
    assert "train/kd" in _tags(out)


def refused(world: World, capsys: pytest.CaptureFixture, **settings: Any) -> str:
    capsys.readouterr()
    status, out = world.recycle("refused", world.other, world.full, **settings)
    assert status == 2 and not out.exists()
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def test_other_labels_have_to_be_allowed(world: World, capsys) -> None:
    wrong = "full: was tuned for labels ['left', 'middle', 'right'], the task other has ['down', 'up']; "
    for method in TRAINED:
        assert wrong + "related_task=true recycles all but the head" in refused(world, capsys, method=method)
    assert wrong + "apply trains no head" in refused(world, capsys, method="apply")
    for allowed in (False, True):
        said = refused(world, capsys, method="apply", related_task=allowed)
        assert "unknown key 'related_task'; method apply reads align, allow_unrelated, base, dare, " in said


def test_scoring_wants_the_same_labels_as_before(world: World, capsys) -> None:
    argv = ["evaluate", "--weights", world.full, "--base", world.base, "--task", world.other]
    assert main([str(word) for word in argv]) == 2
    assert "was tuned for labels ['left', 'middle', 'right']" in capsys.readouterr().err


# ---- what method: interpolate refuses


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"interpolation_draws": 2, "interpolation_points": [0.5]},
            "interpolation_points and interpolation_draws are both given, expected one of them",
        ),
        ({"interpolation_points": [0.5, 1.0]}, "interpolation_points.1: found 1.0, expected: less than 1"),
        ({"interpolation_points": []}, "interpolation_points: found [], expected: "),
        ({"interpolation_margin": 0.5}, "interpolation_margin: found 0.5, expected: less than 0.5"),
        (
            {"alpha": None, "alpha_by_point": [1, 1]},
            "alpha_by_point: 2 values, expected 3: one per point and one for x = 1",
        ),
        ({"second_weights": "w"}, "second_weights and second_base go together, found one of them"),
        ({"method": "both", "start": "fresh"}, "unknown key 'start'; method both reads adam_beta1, adam_beta2, "),
    ],
)
def test_a_path_that_cannot_be_meant_is_refused(world: World, capsys, settings: dict[str, Any], said: str) -> None:
    assert said in refused(world, capsys, **{"method": "interpolate", **settings})


def test_there_is_no_path_between_bases_of_unlike_shapes(world: World, capsys) -> None:
    wide = make_base(world.folder / "wide", layers=3)
    said = refused(
        world, capsys, method="interpolate", start="fresh", base=wide, allow_unrelated=True, related_task=True
    )
    assert "encoder.layer.2.attention.output.LayerNorm.bias is (32,), in " in said
    assert "missing: no path to interpolate on" in said


def test_the_second_fixed_model_is_of_the_first_ones_kind_and_of_its_own_base(world: World, capsys) -> None:
    shared = {"method": "interpolate", "related_task": True}
    said = refused(world, capsys, **shared, second_weights=world.lora, second_base=world.base)
    assert "lora: its tuning is {" in said and "'lora_r': 4" in said and said.endswith("}, expected full")
    said = refused(world, capsys, **shared, second_weights=world.full, second_base=world.upgraded)
    assert "belongs to base" in said
