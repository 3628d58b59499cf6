"""Controls: random differences as large as the outdated ones, tensor by tensor, drawn from the seed; the head stays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from worlds import make_adapter, make_base, make_outdated, make_task, make_upgraded, write_config

from recyclable.cli import main
from recyclable.weights.manifest import ADAPTER, DELTA, HEAD, read_manifest


class World:
    """A base and its upgrade, and weights of each kind tuned on the older."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.old = make_base(root / "old")
        self.new = make_upgraded(self.old, root / "new")
        self.task = make_task(root / "task")
        self.weights = {
            "full": make_outdated(self.old, self.task, root / "full"),
            "lora": make_adapter(self.old, self.task, root / "lora", "lora"),
            "bottleneck": make_adapter(self.old, self.task, root / "bottleneck", "bottleneck"),
        }

    def recycle(self, out: str, method: str, weights: Path, **more: Any) -> tuple[int, Path]:
        given = {"base": self.new, "old_base": self.old, "weights": weights, "task": self.task, "seed": 20, **more}
        file = write_config(self.root / f"{out}.yaml", {"method": method, "out": self.root / out, **given})
        return main(["recycle", str(file)]), self.root / out


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("controls"))


def share_of_equal_signs(one: torch.Tensor, other: torch.Tensor) -> float:
    return (one.sign() == other.sign())[one != 0].float().mean().item()


def test_a_delta_keeps_its_magnitudes_and_loses_its_signs(world: World) -> None:
    status, out = world.recycle("shuffled-full", "shuffled", world.weights["full"])
    assert status == 0 and read_manifest(out).method == "shuffled"
    before, after = load_file(world.weights["full"] / DELTA), load_file(out / DELTA)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor.abs(), after[name].float().abs()), name
    whole = [torch.cat([of[name].flatten() for name in sorted(of)]) for of in (before, after)]
    assert abs(share_of_equal_signs(*whole) - 0.5) < 0.05
    assert (out / HEAD).read_bytes() == (world.weights["full"] / HEAD).read_bytes()


def test_another_seed_draws_other_signs_and_the_same_one_the_same(world: World) -> None:
    found = []
    for out, seed in (("a", 20), ("b", 20), ("c", 21)):
        assert world.recycle(f"seeds-{out}", "shuffled", world.weights["full"], seed=seed)[0] == 0
        found.append((world.root / f"seeds-{out}" / DELTA).read_bytes())
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize("kind", ["lora", "bottleneck"])
def test_both_factors_of_an_adapter_are_drawn_and_its_head_is_not(world: World, kind: str) -> None:
    status, out = world.recycle(f"shuffled-{kind}", "shuffled", world.weights[kind])
    assert status == 0
    before, after = load_file(world.weights[kind] / ADAPTER), load_file(out / ADAPTER)
    factors = {"lora": ("lora_A", "lora_B"), "bottleneck": ("bottleneck_down", "bottleneck_up")}[kind]
    for factor in factors:
        names = [name for name in before if factor in name and before[name].dim() == 2]
        one, other = (torch.cat([of[name].flatten() for name in names]) for of in (before, after))
        assert torch.equal(one.abs(), other.abs()) and abs(share_of_equal_signs(one, other) - 0.5) < 0.1, factor
    heads = [name for name in before if "classifier" in name]
    assert heads and all(torch.equal(before[name], after[name]) for name in heads)


def test_training_may_start_from_a_random_difference(world: World) -> None:
    """At step 0, and kept where no step is better, it is the control that is not trained."""
    training = {"max_steps": 1, "learning_rate": 1e-12, "weight_decay": 0.0, "save_every": 0}
    status, out = world.recycle("shuffled-init", "shuffled_init", world.weights["full"], **training)
    assert status == 0
    assert world.recycle("control", "shuffled", world.weights["full"])[0] == 0
    one, other = (read_manifest(world.root / name) for name in ("shuffled-init", "control"))
    assert {name: one.history[0][name] for name in other.metrics["dev"]} == other.metrics["dev"]
    start, control = load_file(out / DELTA), load_file(world.root / "control" / DELTA)
    assert all(torch.allclose(start[name], control[name], atol=1e-6) for name in control)


def test_weights_that_are_no_differences_have_no_control(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    task = {"base": world.old, "task": world.task, "max_steps": 1, "learning_rate": 1e-3, "max_length": 24}
    dora = {"tuning": "lora", "lora_r": 2, "use_dora": True, "save_every": 0, "out": world.root / "dora"}
    assert main(["tune", str(write_config(world.root / "dora.yaml", {**task, **dora}))]) == 0
    capsys.readouterr()
    assert world.recycle("of-dora", "shuffled", world.root / "dora")[0] == 2
    assert "is a DoRA" in capsys.readouterr().err and not (world.root / "of-dora").exists()
