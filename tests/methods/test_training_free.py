"""`method: project`: what other tasks show is done to a new task's weights, at a strength that a few labels show."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import STAGE_3, finish, outcome
from processes import start as start_ranks
from safetensors.torch import load_file
from transformers import AutoTokenizer, BertForSequenceClassification
from worlds import LABELS, make_adapter, make_base, make_outdated, make_task, make_upgraded, rewrite_rows, write_config

from recyclable.cli import main
from recyclable.recipes.apply import PROVENANCE
from recyclable.tasks.parts.fewshot import limit
from recyclable.tasks.parts.task import load_task
from recyclable.weights.adapted import AdaptedWeights
from recyclable.weights.base import Base
from recyclable.weights.manifest import ADAPTER, DELTA, HEAD, read_manifest
from recyclable.weights.store import Store

EXAMPLES, SEED, GROWTH = 25, 20, 1.5


class World:
    """A base and its upgrade; tasks tuned on both, where the upgraded difference is the outdated one times 1.5."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.old = make_base(root / "old")
        self.new = make_upgraded(self.old, root / "new")
        self.task = make_task(root / "task")
        self.known_task = make_task(root / "known", seed=5)
        self.weights = make_outdated(self.old, self.task, root / "weights", scale=0.1)
        self.pairs = [
            [
                make_outdated(base, self.known_task, root / f"known-{name}-{seed}", scale=scale, seed=seed)
                for name, base, scale in (("old", self.old, 0.02), ("new", self.new, 0.02 * GROWTH))
            ]
            for seed in (31, 32)
        ]
        self.stranger = make_outdated(make_base(root / "stranger", seed=9), self.known_task, root / "on-stranger")

    def config(self, out: str, **changed: Any) -> dict[str, Any]:
        return {
            "method": "project",
            "base": self.new,
            "old_base": self.old,
            "weights": self.weights,
            "task": self.task,
            "project_from": self.pairs,
            "strength_examples": EXAMPLES,
            "max_length": 24,
            "seed": SEED,
            "out": self.root / out,
            **changed,
        }

    def recycle(self, out: str, **changed: Any) -> tuple[int, Path]:
        file = write_config(self.root / f"{out}.yaml", self.config(out, **changed))
        return main(["recycle", str(file)]), self.root / out


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("training-free"))


def plain_loss(world: World, strength: float) -> float:
    """Mean loss of plain transformers with base + strength x 1.5 difference, on the examples that are asked."""
    delta, head, base = load_file(world.weights / DELTA), load_file(world.weights / HEAD), Base(world.new)
    model = BertForSequenceClassification.from_pretrained(world.new, num_labels=3).eval()
    values = {n: base[n] + strength * GROWTH * delta[n] for n in delta} | head
    model.load_state_dict({n: values[n.removeprefix("bert.")] for n in model.state_dict()})
    few = limit(load_task(world.task).splits["dev"], EXAMPLES, SEED)
    tokens = AutoTokenizer.from_pretrained(world.new)(few.texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        return torch.nn.functional.cross_entropy(model(**tokens).logits, torch.tensor(few.labels)).item()


def test_a_new_task_is_projected_as_the_known_ones_and_added_at_the_strength_of_the_lowest_loss(world: World) -> None:
    status, out = world.recycle("linear")
    assert status == 0
    manifest = read_manifest(out)
    told = manifest.recycled_from["strength"]
    assert told["examples"] == EXAMPLES
    tried = {float(strength): loss for strength, loss in told["loss_by_common_strength"].items()}
    assert {0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5} < tried.keys()
    for strength, loss in tried.items():
        assert loss == pytest.approx(plain_loss(world, strength), rel=1e-4), strength
    strength = min(tried, key=tried.get)
    assert told["strength"] == {"all": strength} and told["loss"] == tried[strength]
    found, delta = load_file(out / DELTA), load_file(world.weights / DELTA)
    assert found.keys() == delta.keys()
    for name, tensor in found.items():
        assert torch.allclose(tensor, strength * GROWTH * delta[name], atol=1e-5), name
    assert (out / HEAD).read_bytes() == (world.weights / HEAD).read_bytes()


def test_the_result_is_adapted_weights_of_the_new_base_that_say_what_they_were_learned_from(world: World) -> None:
    status, out = world.recycle("network", project_with="network", project_rank=4)
    assert status == 0
    weights = AdaptedWeights(out)
    told = weights.manifest.recycled_from["projection"]
    assert weights.manifest.method == "project" and weights.manifest.base["name"] == str(world.new)
    assert (told["with"], told["rank"]) == ("network", 4)
    for pair, learned in zip(world.pairs, told["learned_from"], strict=True):
        assert learned["task"] == "known"
        for folder, when in zip(pair, ("old", "new"), strict=True):
            assert learned[when] == {"weights": str(folder), "files": read_manifest(folder).files}
    assert main(["evaluate", "--weights", str(out), "--base", str(world.new), "--task", str(world.task)]) == 0
    scored = weights.manifest.metrics
    assert scored["test"]["accuracy"] > 0 and scored["best_step"] == 0 and scored["examples"] == 0


# Name -> ZeRO stage, and what a run changes of World.config.
ON_TWO_RANKS = {
    "apply": (3, {"method": "apply", "project_from": None, "strength_examples": None}),
    "apply-auto": (3, {"method": "apply", "project_from": None, "scale": "auto"}),
    "project": (3, {}),
    "project-whole": (0, {}),
}


@pytest.fixture(scope="module")
def together(world: World) -> World:
    """All of ON_TWO_RANKS recycled, by one start of the processes."""
    runs = []
    for name, (stage, changed) in ON_TWO_RANKS.items():
        config = {key: value for key, value in world.config(f"ranks-{name}", **changed).items() if value is not None}
        zero = {"stage": stage, **(STAGE_3 if stage == 3 else {})}
        runs.append({"verb": "recycle", "config": config, "ds_config": {"zero_optimization": zero}})
    finish(start_ranks(world.root / "together", runs, nproc=2), world.root / "together")
    return world


@pytest.mark.parametrize("name", ON_TWO_RANKS)
def test_two_ranks_recycle_what_one_process_does_sharded_too(together: World, name: str) -> None:
    ranks = together.root / f"ranks-{name}"
    assert outcome(ranks) == {}
    status, alone = together.recycle(f"alone-{name}", **ON_TWO_RANKS[name][1])
    assert status == 0
    one, other = read_manifest(alone), read_manifest(ranks)
    for split in ("dev", "test"):
        assert one.metrics[split] == pytest.approx(other.metrics[split], rel=1e-5), split
    strengths = [of.recycled_from.get("strength") for of in (one, other)]
    assert [found is None for found in strengths] == [name == "apply"] * 2
    if name != "apply":
        assert strengths[0]["strength"] == strengths[1]["strength"]
        assert strengths[0]["loss"] == pytest.approx(strengths[1]["loss"], rel=1e-5)
    for file in (DELTA, HEAD):
        expected, found = load_file(alone / file), load_file(ranks / file)
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[tensor], found[tensor]) for tensor in expected), file


@pytest.mark.parametrize("kind", ["lora", "bottleneck"])
def test_adapters_are_projected_too_and_their_strength_is_that_of_their_effect(world: World, kind: str) -> None:
    def adapter(base: Path, name: str, seed: int) -> Path:
        return make_adapter(base, world.task, world.root / f"{kind}-{name}", kind, seed=seed)

    weights = adapter(world.old, "w", 6)
    pair = [adapter(world.old, "k0", 7), adapter(world.new, "k1", 7)]
    status, out = world.recycle(f"project-{kind}", weights=weights, project_from=[pair])
    assert status == 0
    strength = read_manifest(out).recycled_from["strength"]["strength"]["all"]
    found, outdated = load_file(out / ADAPTER), load_file(weights / ADAPTER)
    old, new = Base(world.old), Base(world.new)
    multiplied = set()
    for name, tensor in found.items():
        base_name = name.removeprefix("base_model.model.").removeprefix("bert.")
        if base_name in new:  # a layer norm's full values; the pair's own differences are not the same on both bases
            multiplied.add("LayerNorm")
            assert not torch.equal(tensor, outdated[name] + new[base_name] - old[base_name])
        elif "lora_B" in name or "bottleneck_up" in name:
            multiplied.add("up")
            assert torch.allclose(tensor, strength * outdated[name], atol=1e-5), name
        else:
            assert torch.allclose(tensor, outdated[name], atol=1e-5), name
    assert multiplied == ({"up", "LayerNorm"} if kind == "bottleneck" else {"up"})


def test_pairs_may_be_names_in_the_store_and_the_task_itself_is_noted(world: World, capsys) -> None:
    store = Store(world.root / "store")
    own = make_outdated(world.new, world.task, world.root / "own", scale=0.15)
    for name, folder in (("before", world.weights), ("after", own)):
        with store.adding(name) as aside:
            shutil.copytree(folder, aside, dirs_exist_ok=True)
    status, out = world.recycle("named", store=store.folder, project_from=[["before", "after"]])
    assert status == 0
    assert f"notice: {store.folder / 'after'} is for task itself" in capsys.readouterr().out
    assert read_manifest(out).recycled_from["projection"]["learned_from"][0]["task"] == "task"


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (lambda w: {"project_from": None}, "refused.yaml: key 'project_from' is missing"),
        (lambda w: {"project_from": []}, "project_from: found [], expected: List should have at least 1 item"),
        (lambda w: {"project_from": [[w.weights]]}, "key 'project_from.0.1' is missing"),
        (lambda w: {"method": "apply"}, "unknown key 'project_from'; method apply reads align, allow_unrelated, "),
        (lambda w: {"scale": 0.5}, "scale is 0.5, but method project finds its strength itself"),
        (lambda w: {"project_with": "magic"}, "project_with: found 'magic', expected: 'linear' or 'network'"),
        (lambda w: {"project_from": [["nothing", w.weights]]}, "nothing: is no directory of adapted weights, nor a"),
        (lambda w: {"project_from": [w.pairs[0][::-1]]}, "known-old-31: belongs to base"),
        (lambda w: {"project_from": [[w.pairs[0][0], w.stranger]]}, "on-stranger: belongs to base"),
        (lambda w: {"project_from": [[w.weights, w.pairs[0][1]]]}, "project_from.0: found weights of {'name': 'task'"),
    ],
)
def test_pairs_that_do_not_fit_are_refused(world: World, capsys, changed, said: str) -> None:
    status, out = world.recycle("refused", **changed(world))
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert status == 2 and said in line and not out.exists()


def test_another_kind_of_tuning_is_refused(world: World, capsys) -> None:
    lora = make_adapter(world.old, world.known_task, world.root / "a-lora", "lora")
    status, out = world.recycle("refused", project_from=[[lora, world.pairs[0][1]]])
    line = capsys.readouterr().err
    found = {"tuning": "lora", "lora_alpha": 16, "lora_r": read_manifest(lora).tuning["lora_r"]}
    assert status == 2 and f"a-lora: its tuning is {found}, expected full" in line
    assert not out.exists()


def test_a_pair_that_was_changed_after_it_was_written_is_found(world: World, capsys) -> None:
    changed = shutil.copytree(world.pairs[0][1], world.root / "changed")
    data = bytearray((changed / DELTA).read_bytes())
    data[-5] ^= 1
    (changed / DELTA).write_bytes(data)
    status, out = world.recycle("refused", project_from=[[world.pairs[0][0], changed]])
    assert status == 2 and f"{changed / DELTA}: was changed after it was written" in capsys.readouterr().err
    assert not out.exists()


def test_other_labels_are_refused(world: World, capsys) -> None:
    other = make_task(world.root / "other")
    rewrite_rows(other, lambda row: row.update(label=row["label"].replace(LABELS[0], "up")))
    status, out = world.recycle("refused", task=other)
    assert status == 2 and "project trains no head" in capsys.readouterr().err and not out.exists()


def by_hand(world: World, folder: Path, scales: dict[str, float]) -> dict[str, torch.Tensor]:
    """The tensors of base + difference, each times its group's strength."""
    delta, base = load_file(folder / DELTA), Base(world.new)

    def group(name: str) -> str:
        return f"layer {name.split('.')[2]}" if name.startswith("encoder.layer.") else "embeddings"

    return {name: base[name] + scales[group(name)] * tensor for name, tensor in delta.items()}


def test_apply_finds_a_scale_for_each_layer_group_that_no_common_one_beats(world: World) -> None:
    command = ["apply", "--weights", world.weights, "--base", world.new, "--task", world.task, "--examples", EXAMPLES]
    assert main([*map(str, command), "--scale", "auto", "--out", str(world.root / "auto")]) == 0
    told = json.loads((world.root / "auto" / PROVENANCE).read_text())["strength"]
    assert told["strength"].keys() == {"embeddings", "layer 0", "layer 1"}
    assert told["examples"] == EXAMPLES and told["loss"] <= min(told["loss_by_common_strength"].values())
    found = {n.removeprefix("bert."): t for n, t in load_file(world.root / "auto" / "model.safetensors").items()}
    for name, tensor in by_hand(world, world.weights, told["strength"]).items():
        assert torch.allclose(found[name], tensor, atol=1e-6), name
    few = limit(load_task(world.task).splits["dev"], EXAMPLES, SEED)
    tokens = AutoTokenizer.from_pretrained(world.root / "auto")(few.texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = BertForSequenceClassification.from_pretrained(world.root / "auto").eval()(**tokens).logits
    assert torch.nn.functional.cross_entropy(logits, torch.tensor(few.labels)).item() == pytest.approx(
        told["loss"], rel=1e-4
    )


def test_recycling_by_apply_with_scale_auto_gives_the_same_weights(world: World) -> None:
    status, out = world.recycle("auto-recycled", method="apply", project_from=None, scale="auto")
    assert status == 0
    told = read_manifest(out).recycled_from["strength"]
    base, delta = Base(world.new), load_file(out / DELTA)
    for name, tensor in by_hand(world, world.weights, told["strength"]).items():
        assert torch.allclose(base[name] + delta[name], tensor, atol=1e-5), name


@pytest.mark.parametrize("kind", ["lora", "bottleneck"])
def test_an_adapters_scales_are_found_too(world: World, kind: str) -> None:
    weights = make_adapter(world.old, world.task, world.root / f"auto-{kind}-w", kind)
    out, plain = world.root / f"auto-{kind}", world.root / f"auto-{kind}-plain"
    command = ["apply", "--weights", str(weights), "--base", str(world.new), "--out"]
    assert main([*command, str(out), "--scale", "auto", "--task", str(world.task), "--examples", "20"]) == 0
    assert main([*command, str(plain)]) == 0
    scales, base = read_manifest(out).recycled_from["strength"]["strength"], dict(Base(world.new).items())
    assert scales.keys() == {"layer 0", "layer 1", *(["embeddings"] if kind == "bottleneck" else [])}
    whole = load_file(plain / ADAPTER)
    for name, tensor in load_file(out / ADAPTER).items():
        own = name.removeprefix("base_model.model.bert.")
        scaled = own in base or "lora_B" in name or "bottleneck_up" in name
        group = f"layer {own.split('.')[2]}" if own.startswith("encoder") else "embeddings"
        from_base = base.get(own, torch.zeros(()))
        wanted = from_base + (scales[group] if scaled else 1.0) * (whole[name] - from_base)
        assert torch.allclose(tensor, wanted, atol=1e-6), name


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--scale", "auto"], "task: is missing, scale auto is found on a task"),
        (["--task", "TASK"], "only scale auto needs it"),
        (["--scale", "auto", "--task", "TASK", "--examples", "0"], "examples: found 0, expected at least 1"),
        (["--scale", "much"], "scale"),
    ],
)
def test_a_scale_that_cannot_be_found_is_refused(world: World, capsys, options: list[str], said: str) -> None:
    out = world.root / "no"
    command = ["apply", "--weights", world.weights, "--base", world.new, "--out", out, *options]
    assert main([str(world.task if part == "TASK" else part) for part in command]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert said in line and not out.exists()


def test_scale_auto_is_refused_where_something_is_trained(world: World, capsys) -> None:
    changed = {"method": "init", "project_from": None, "strength_examples": None, "max_steps": 1, "learning_rate": 1e-3}
    status, out = world.recycle("refused", **changed, scale="auto")
    said = "refused.yaml: scale: found 'auto', expected: a valid number, unable to parse string as a number"
    assert status == 2 and said in capsys.readouterr().err
    assert not out.exists()
