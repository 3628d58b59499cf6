"""A strength: the base at 0, the file at 1, base + strength x difference elsewhere, against peft's own merges."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from adapters import HEAD, answers, full_value_kinds, ids_of, lora, make_peft, plain, taken_in
from peft import AdaLoraConfig, IA3Config, LoHaConfig, PeftConfig, PeftModel, PromptTuningConfig, TaskType
from safetensors.torch import load_file
from worlds import Chain, make_adapter

from recyclable.carrying.carried import Carried
from recyclable.carrying.changes import FoundChanges
from recyclable.carrying.putting import Placement
from recyclable.carrying.scaling import Strength
from recyclable.errors import InputError
from recyclable.models.tasks import fresh_model, outdated_model
from recyclable.recipes.apply import apply
from recyclable.tasks.parts.task import load_task
from recyclable.tasks.parts.task_data import few_examples, unseen_split
from recyclable.weights.manifest import ADAPTER
from recyclable.weights.sources import fill, set_source

_BY_MODULE = {"rank_pattern": {"query": 2}, "alpha_pattern": {"layer.0.attention.self.query": 32}}
MERGED: dict[str, PeftConfig] = {
    "lora": lora(),
    "rslora": lora(use_rslora=True),
    "patterns": lora(**_BY_MODULE),
    "lora-bias": lora(lora_bias=True),
    "adalora": AdaLoraConfig(
        task_type=TaskType.SEQ_CLS, init_r=4, target_r=4, total_step=1, target_modules=["query"], modules_to_save=HEAD
    ),
    "dora": lora(use_dora=True),
    "dora-rslora-patterns": lora(use_dora=True, use_rslora=True, **_BY_MODULE),
    **{name: kind for name, kind in full_value_kinds().items() if name != "rows"},
}
TEXTS = ids_of([["w1", "w20", "w33", "w4"], ["w2", "w9", "w90", "w61"]])


class World(Chain):
    """A base, its upgrade, adapters of every kind."""

    def weights(self, name: str, config: PeftConfig) -> Path:
        folder = self.folder / "weights" / name
        if not folder.exists():
            tuned = make_peft(self.base, config, self.folder / "peft" / name)
            taken_in(tuned, self.base, self.task, folder)
        return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("strengths"))


def merged(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """What peft makes of base and adapter."""
    state = PeftModel.from_pretrained(plain(base), adapter).merge_and_unload().state_dict()
    return {name.replace(".modules_to_save.default", ""): tensor for name, tensor in state.items()}


@pytest.mark.parametrize("base", ["base", "upgraded"])
@pytest.mark.parametrize("kind", MERGED)
def test_weights_are_the_base_and_strength_times_the_difference(
    world: World, kind: str, base: str, tmp_path: Path
) -> None:
    weights, onto = world.weights(kind, MERGED[kind]), getattr(world, base)
    apply([weights], onto, tmp_path / "1", FoundChanges())
    bare, whole = plain(onto).state_dict(), merged(onto, tmp_path / "1")
    heads = ("classifier", "bert.pooler")
    moved = {name: whole[name] - tensor for name, tensor in bare.items() if not name.startswith(heads)}
    assert max(difference.abs().max() for difference in moved.values()) > 0.1
    for strength in (0.0, 0.5, 1.25):
        apply([weights], onto, tmp_path / str(strength), FoundChanges(scale=strength))
        found = merged(onto, tmp_path / str(strength))
        for name, difference in moved.items():
            assert torch.allclose(found[name], bare[name] + strength * difference, atol=2e-6), (name, strength)
        head = load_file(weights / ADAPTER)
        assert torch.equal(found["classifier.weight"], head["base_model.model.classifier.weight"])


@pytest.mark.parametrize("kind", [*MERGED, "bottleneck"])
def test_at_1_it_is_the_file_and_at_0_the_base_with_the_adapters_head(world: World, kind: str, tmp_path: Path) -> None:
    if kind == "bottleneck":
        weights = world.folder / "bottleneck"
        make_adapter(world.base, world.task, weights, kind)
    else:
        weights = world.weights(kind, MERGED[kind])
    carried, task = Carried.open(weights, None, world.base), load_task(world.task)
    differences = carried.adapter_differences()
    strength = Strength(carried, differences)

    def said(scale: float) -> torch.Tensor:
        model, scaled = fresh_model(carried, task, 20), strength.at(dict.fromkeys(strength.names, scale))
        for parameter, read in Placement(model, carried, scaled).reads(scaled):
            set_source(parameter, read)
        return answers(fill(model), TEXTS)

    assert torch.equal(said(1.0), answers(fill(outdated_model(carried, task, 20)), TEXTS))
    head = {n.removeprefix("base_model.model."): t for n, t in load_file(weights / ADAPTER).items()}
    bare = plain(world.base)
    bare.load_state_dict({n: t for n, t in head.items() if n.startswith(("classifier.", "bert.pooler."))}, strict=False)
    wanted = answers(bare, TEXTS)
    assert torch.allclose(said(0.0), wanted, atol=1e-6)
    assert not torch.allclose(said(1.0), wanted, atol=1e-2)


def test_a_strength_that_is_found_is_the_one_that_is_given(world: World, tmp_path: Path) -> None:
    """The file at the strengths of each layer group is what the search tried."""
    weights = world.weights("dora", MERGED["dora"])
    record = apply(
        [weights], world.upgraded, tmp_path / "auto", FoundChanges(scale="auto"), task=str(world.task), examples=12
    )
    found = record["strength"]["strength"]
    assert any(strength != 1 for strength in found.values())
    carried = Carried.open(weights, world.base, world.upgraded)
    strength = Strength(carried, carried.adapter_differences())
    groups = carried.new.structure.layers.split(strength.names)
    differences = strength.at({name: found[group] for group, names in groups.items() for name in names})
    for name, tensor in load_file(tmp_path / "auto" / ADAPTER).items():
        assert torch.equal(tensor.view(-1), differences.read(name)), name
    task, length = load_task(world.task), carried.weights.manifest.settings["max_length"]
    few = few_examples(task, carried.reader, length, 12, 20, split=unseen_split(task))
    model = PeftModel.from_pretrained(plain(world.upgraded), tmp_path / "auto")
    batch = few.batch([(at, at) for at in range(len(few))])
    with torch.no_grad():
        logits = model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    loss = torch.nn.functional.cross_entropy(logits, batch["labels"])
    assert abs(loss.item() - record["strength"]["loss"]) < 1e-4


@pytest.mark.parametrize(
    "config",
    [
        IA3Config(
            task_type=TaskType.SEQ_CLS,
            target_modules=["key"],
            feedforward_modules=[],
            modules_to_save=[*HEAD, "LayerNorm"],
        ),
        PromptTuningConfig(task_type=TaskType.SEQ_CLS, num_virtual_tokens=3, modules_to_save=[*HEAD, "LayerNorm"]),
        LoHaConfig(task_type=TaskType.SEQ_CLS, r=2, target_modules=["query"], modules_to_save=HEAD),
    ],
    ids=["ia3", "prompts", "loha"],
)
def test_a_kind_whose_effect_no_factor_scales_has_none(world: World, config: PeftConfig, tmp_path: Path) -> None:
    weights = world.weights(str(config.peft_type), config)
    with pytest.raises(InputError, match=r"is neither a LoRA nor a bottleneck adapter .*: it has no strength"):
        apply([weights], world.base, tmp_path / "out", FoundChanges(scale=0.5))
    assert not (tmp_path / "out").exists()
