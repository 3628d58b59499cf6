"""Paths, curves and planes through models, streamed, against whole models in plain PyTorch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from worlds import make_adapter, make_base, make_outdated, make_task, make_upgraded

from recyclable.analysis import connectivity as paths
from recyclable.analysis.connectivity import Blend, barrier, connectivity, path_points, straight
from recyclable.analysis.curve import bezier, train_middle
from recyclable.analysis.measure import measure
from recyclable.analysis.plane import Plane, plane_through, surface
from recyclable.carrying.carried import Carried
from recyclable.data.examples import LabelledTexts
from recyclable.models.tasks import outdated_model
from recyclable.tasks.parts.task import load_task
from recyclable.weights.adapted import AdaptedWeights
from recyclable.weights.base import Base
from recyclable.weights.sources import fill, is_unread
from recyclable.weights.vocabulary import load_tokenizer


class World:
    """M0, its upgrade M1, a task, full weights and bottleneck adapters of both."""

    def __init__(self, root: Path) -> None:
        self.bases = [make_base(root / "m0")]
        self.bases.append(make_upgraded(self.bases[0], root / "m1", scale=0.1))
        self.task = make_task(root / "task")
        for i, base in enumerate(self.bases):
            make_outdated(base, self.task, root / f"full-{i}", seed=3 + i)
            make_adapter(base, self.task, root / f"bottleneck-{i}", "bottleneck", seed=6 + i)
        self.root, self.labelled = root, load_task(self.task)
        self.texts = {
            split: LabelledTexts(self.labelled.splits[split], load_tokenizer(self.bases[0]), 24)
            for split in ("train", "dev", "test")
        }

    def model(self, kind: str, i: int, on: int | None = None) -> nn.Module:
        """The weights tuned on base i, on that base or another, unread."""
        old, new = Base(self.bases[i]), Base(self.bases[i if on is None else on])
        return outdated_model(Carried(AdaptedWeights(self.root / f"{kind}-{i}"), old, new), self.labelled, 20)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("paths"))


def by_hand(models: list[nn.Module], factors: tuple[float, ...], texts: LabelledTexts) -> tuple[nn.Module, dict]:
    """Whole state dicts in fp64, then every example by itself."""
    states = [fill(copy.deepcopy(model)).state_dict() for model in models]
    mixed = {n: sum(f * s[n].double() for f, s in zip(factors, states, strict=True)) for n in states[0]}
    model = fill(copy.deepcopy(models[0])).eval()
    model.load_state_dict({name: tensor.float() for name, tensor in mixed.items()})
    losses, right = [], []
    with torch.no_grad():
        for i in range(len(texts)):
            batch = texts.batch([(0, i)])
            label = batch.pop("labels")
            logits = model(**batch).logits
            losses.append(F.cross_entropy(logits, label).item())
            right.append(logits.argmax(-1).item() == label.item())
    return model, {"loss": np.mean(losses), "accuracy": np.mean(right)}


@pytest.mark.parametrize(("kind", "on"), [("full", None), ("bottleneck", None), ("bottleneck", 1)])
def test_the_path_is_what_whole_models_give(world: World, kind: str, on: int | None) -> None:
    """Full weights; adapters with the backbone interpolated; adapters alone, on one backbone."""
    ends = [world.model(kind, 0, on), world.model(kind, 1)]
    rows = connectivity(ends, world.texts, world.labelled, points=[0, 0.3, 1])
    assert [row["mu"] for row in rows] == [0, 0.3, 1] and all(is_unread(end) for end in ends)
    for row in rows:
        for split in ("dev", "test"):
            _, wanted = by_hand(ends, straight(row["mu"]), world.texts[split])
            assert row[split]["loss"] == pytest.approx(wanted["loss"], abs=1e-5)
            assert row[split]["accuracy"] == wanted["accuracy"]


def test_ends_are_exact_and_one_model_serves_all_points(world: World) -> None:
    ends = [world.model("full", 0), world.model("full", 1)]
    blend = Blend(ends)
    middle = blend.place(straight(0.5))
    assert blend.place(straight(0.0)) is middle
    for mu, end in ((0.0, ends[0]), (1.0, ends[1])):
        wanted = fill(copy.deepcopy(end)).state_dict()
        found = blend.place(straight(mu)).state_dict()
        assert found.keys() == wanted.keys() and all(torch.equal(found[n], wanted[n]) for n in wanted)
    with pytest.raises(ValueError, match="different structures"):
        Blend([ends[0], world.model("bottleneck", 1)])


def test_finished_points_are_not_computed_again(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ends, dev = [world.model("full", 0), world.model("full", 1)], {"dev": world.texts["dev"]}
    asked: list[nn.Module] = []
    original: Callable = paths.measure
    monkeypatch.setattr(paths, "measure", lambda *all: asked.append(all[0]) or original(*all))
    whole = connectivity(ends, dev, world.labelled, points=path_points(5))
    connectivity(ends, dev, world.labelled, points=path_points(3), file=tmp_path / "f.json", key="k")
    asked.clear()
    again = connectivity(ends, dev, world.labelled, points=path_points(5), file=tmp_path / "f.json", key="k")
    assert again == whole and len(asked) == 2


def test_the_papers_points() -> None:
    assert np.allclose(path_points(), np.linspace(0, 1, 26), atol=1e-15)


@pytest.mark.parametrize("seed", range(3))
def test_the_barrier_is_numpys(seed: int) -> None:
    mu, loss = np.linspace(0, 1, 26), np.random.default_rng(seed).random(26)
    wanted = max(loss[i] - np.interp(mu[i], [0, 1], [loss[0], loss[-1]]) for i in range(26))
    assert barrier(mu.tolist(), loss.tolist()) == pytest.approx(wanted)
    assert barrier(mu[::-1].tolist(), loss[::-1].tolist()) == pytest.approx(wanted)


def test_a_sagging_path_has_no_barrier() -> None:
    assert barrier([0, 0.5, 1], [1.0, 0.2, 0.8]) == 0
    assert barrier([0, 0.5, 1], [0.5, 1.0, 0.3]) == pytest.approx(0.6)


# ---- the curve ---------------------------------------------------------------------------------------------------


def test_a_bezier_ends_at_its_ends_and_is_straight_with_a_straight_middle() -> None:
    assert bezier(0.0) == (1, 0, 0) and bezier(1.0) == (0, 0, 1)
    for x in np.linspace(0, 1, 7):
        first, middle, last = bezier(float(x))
        assert (first + middle / 2, middle / 2 + last) == pytest.approx(straight(float(x)))


class Net(nn.Module):
    """A classifier of counts of words with one hidden layer, called like a transformer."""

    def __init__(self, words: int) -> None:
        super().__init__()
        self.words, self.hidden, self.out = words, nn.Linear(words, 6), nn.Linear(6, 3)

    def forward(self, input_ids: torch.Tensor, **_: torch.Tensor):
        counts = F.one_hot(input_ids, self.words).float().sum(1)
        return type("Output", (), {"logits": self.out(torch.tanh(self.hidden(counts)))})


@pytest.fixture(scope="module")
def strangers(world: World) -> list[Net]:
    """Two nets that compute the same, hidden units negated and two of them exchanged: between them lies a barrier."""
    torch.manual_seed(1)
    net = Net(200)
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    batch = world.texts["train"].batch([(0, i) for i in range(len(world.texts["train"]))])
    for _ in range(200):
        optimizer.zero_grad()
        F.cross_entropy(net(batch["input_ids"]).logits, batch["labels"]).backward()
        optimizer.step()
    turned = copy.deepcopy(net)
    with torch.no_grad():
        order = torch.tensor([1, 0, 2, 3, 4, 5])
        turned.hidden.weight.copy_(-net.hidden.weight[order])
        turned.hidden.bias.copy_(-net.hidden.bias[order])
        turned.out.weight.copy_(-net.out.weight[:, order])
    return [net, turned]


def test_training_bends_the_path_round_a_barrier(world: World, strangers: list[Net]) -> None:
    train = {"train": world.texts["train"]}

    def losses(models: list[nn.Module], weigh) -> list[float]:
        rows = connectivity(models, train, world.labelled, points=path_points(9), weigh=weigh)
        return [row["train"]["loss"] for row in rows]

    direct = losses(strangers, straight)
    assert barrier(path_points(9), direct) > 0.3
    before = [copy.deepcopy(net.state_dict()) for net in strangers]
    middle = train_middle(*strangers, world.texts["train"], world.labelled.kind, steps=300, learning_rate=2e-2)
    bent = losses([strangers[0], middle, strangers[1]], bezier)
    assert (bent[0], bent[-1]) == (direct[0], direct[-1])
    assert max(bent) < 0.5 * max(direct)
    for net, state in zip(strangers, before, strict=True):
        assert all(torch.equal(net.state_dict()[name], tensor) for name, tensor in state.items())
    again = train_middle(*strangers, world.texts["train"], world.labelled.kind, steps=300, learning_rate=2e-2)
    assert all(torch.equal(a, b) for a, b in zip(middle.parameters(), again.parameters(), strict=True))


def test_what_the_ends_do_not_train_stays_half_way(world: World) -> None:
    ends = [world.model("bottleneck", 0), world.model("bottleneck", 1)]
    middle = dict(
        train_middle(*ends, world.texts["train"], world.labelled.kind, steps=2, batch_size=8).named_parameters()
    )
    first, last = (dict(fill(copy.deepcopy(end)).named_parameters()) for end in ends)
    for name, parameter in middle.items():
        half_way = torch.allclose(parameter, (first[name] + last[name]) / 2, atol=1e-6)
        assert half_way != parameter.requires_grad or "pooler" in name, name  # a pooler's rows may get no gradient
    assert sum(p.requires_grad for p in middle.values()) > 5


# ---- the plane ---------------------------------------------------------------------------------------------------


def flat(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().double().flatten() for p in fill(copy.deepcopy(model)).parameters()])


def test_the_plane_keeps_lengths_and_angles(world: World) -> None:
    models = [world.model("full", 0), world.model("full", 1), world.model("full", 0, on=1)]
    plane = plane_through(models)
    w = [flat(model) for model in models]
    places = [(0.0, 0.0), (plane.second, 0.0), plane.third]
    for i, factors in enumerate(map(plane.factors, places)):
        assert factors == pytest.approx([float(i == j) for j in range(3)], abs=1e-9)
        for j in range(3):
            apart = np.hypot(places[i][0] - places[j][0], places[i][1] - places[j][1])
            assert apart == pytest.approx(float((w[i] - w[j]).norm()), rel=1e-5, abs=1e-9)
    point = (0.3 * plane.second, -0.7 * plane.third[1])
    found = sum(f * each for f, each in zip(plane.factors(point), w, strict=True))
    e1 = (w[1] - w[0]) / (w[1] - w[0]).norm()
    e2 = w[2] - w[0] - (w[2] - w[0]) @ e1 * e1
    assert torch.allclose(found, w[0] + point[0] * e1 + point[1] * e2 / e2.norm(), atol=1e-6)


def test_the_surface_has_the_loss_of_each_model_where_it_lies(world: World) -> None:
    models, dev = [world.model("full", 0), world.model("full", 1), world.model("full", 0, on=1)], world.texts["dev"]
    found = surface(models, dev, world.labelled, columns=3, rows=2)
    assert len(found["points"]) == 6
    grid = Plane(found["models"][1][0], tuple(found["models"][2])).grid(3, 2)
    assert [(row["x"], row["y"]) for row in found["points"]] == grid
    row = found["points"][4]
    factors = Plane(found["models"][1][0], tuple(found["models"][2])).factors((row["x"], row["y"]))
    assert row["loss"] == pytest.approx(by_hand(models, factors, dev)[1]["loss"], abs=1e-5)
    assert measure(fill(models[0]).eval(), dev, world.labelled)["loss"] > 0


def test_no_plane_goes_through_models_on_a_line() -> None:
    nets = [Net(3) for _ in range(3)]
    with torch.no_grad():
        for net, value in zip(nets, (0.0, 1.0, 2.0), strict=True):
            for parameter in net.parameters():
                parameter.fill_(value)
    with pytest.raises(ValueError, match="on a line"):
        plane_through(nets)
    with pytest.raises(ValueError, match="the same"):
        plane_through([nets[0], nets[0], nets[1]])
