"""Where recycled weights start: differences are added, what the base lacks is copied."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from worlds import make_adapter, make_base, make_outdated, make_task, make_upgraded

from recyclable.carrying.adapter_tensors import BaseValues, Full
from recyclable.carrying.carried import Carried
from recyclable.carrying.putting import differences_of, put
from recyclable.carrying.starts import AdapterDifferences, start_adapter
from recyclable.errors import InputError
from recyclable.models.tasks import fresh_model
from recyclable.tasks.parts.task import load_task
from recyclable.weights.adapted import AdaptedWeights, write_manifest
from recyclable.weights.base import Base
from recyclable.weights.checkpoint_files import InMemory
from recyclable.weights.manifest import ADAPTER, DELTA, HEAD, read_manifest
from recyclable.weights.sources import fill

DRAW = torch.Generator().manual_seed(0)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=DRAW)


def test_an_adapters_layer_norms_move_with_the_base_and_the_rest_stays() -> None:
    old, new = ({"LayerNorm.weight": random(4)} for _ in range(2))
    adapter = {"norm": random(4), "lora_A": random(2, 4), "classifier": random(3, 4), "pooler": random(4)}
    before, after = (BaseValues(InMemory(base), {"norm": Full("LayerNorm.weight")}) for base in (old, new))
    differences = AdapterDifferences(InMemory(adapter), before)
    for name, tensor in adapter.items():
        found = start_adapter(after, differences, name, 1, 3)
        assert torch.equal(start_adapter(after, differences, name, 1, 3, own=True), tensor.view(-1)[1:3])
        moved = new["LayerNorm.weight"] - old["LayerNorm.weight"] if name == "norm" else torch.zeros(tensor.shape)
        assert torch.allclose(found, (tensor + moved).view(-1)[1:3], atol=1e-6), name
        assert name == "norm" or torch.equal(found, tensor.view(-1)[1:3])


class Situation:
    """A base, its upgrade, a task."""

    def __init__(self, root: Path) -> None:
        self.old_folder = make_base(root / "old")
        self.old, self.new = Base(self.old_folder), Base(make_upgraded(self.old_folder, root / "new"))
        self.task_folder = make_task(root / "task")
        self.task = load_task(self.task_folder)

    def started(self, folder: Path) -> torch.nn.Module:
        """A model of the upgrade, as the weights in `folder` need it, and with them on it."""
        carried = Carried(AdaptedWeights(folder), self.old, self.new)
        model = fresh_model(carried, self.task, 20)
        put(model, carried, differences_of(carried))
        return model


@pytest.fixture(scope="module")
def situation(tmp_path_factory: pytest.TempPathFactory) -> Situation:
    return Situation(tmp_path_factory.mktemp("starts"))


def test_a_model_started_from_a_delta_is_new_base_plus_delta_with_the_old_head(
    situation: Situation, tmp_path: Path
) -> None:
    folder = make_outdated(situation.old_folder, situation.task_folder, tmp_path / "outdated")
    model = situation.started(folder)
    delta, head = load_file(folder / DELTA), load_file(folder / HEAD)
    seen = set()
    for name, parameter in fill(model).named_parameters():
        canonical = name.removeprefix("bert.")
        wanted = situation.new[canonical] + delta[canonical] if canonical in delta else head[canonical]
        assert torch.equal(parameter, wanted), name
        seen.add(canonical)
    assert seen == delta.keys() | head.keys()


@pytest.mark.parametrize("kind", ["lora", "bottleneck"])
def test_a_model_started_from_an_adapter(situation: Situation, tmp_path: Path, kind: str) -> None:
    from peft import get_peft_model_state_dict

    folder = make_adapter(situation.old_folder, situation.task_folder, tmp_path / "outdated", kind)
    saved = load_file(folder / ADAPTER)
    model = situation.started(folder)
    started = get_peft_model_state_dict(fill(model), save_embedding_layers=False)
    assert started.keys() == saved.keys()
    moved = set()
    for name, tensor in started.items():
        base_name = name.removeprefix("base_model.model.bert.")
        if base_name in situation.old:
            shift = situation.new[base_name] - situation.old[base_name]
            assert torch.allclose(tensor, saved[name] + shift, atol=1e-6) and shift.abs().sum() > 0
            moved.add(base_name.rpartition(".")[0].rpartition(".")[2])
        else:
            assert torch.equal(tensor, saved[name]), name
    assert moved == ({"LayerNorm"} if kind == "bottleneck" else set())
    assert any("classifier" in name for name in saved) and any("pooler" in name for name in saved)
    backbone = "bert.encoder.layer.0.output.dense"
    frozen = dict(model.named_parameters())
    name = next(n for n in frozen if backbone in n and n.endswith("weight") and not frozen[n].requires_grad)
    assert torch.equal(frozen[name], situation.new["encoder.layer.0.output.dense.weight"])


def test_what_is_missing_left_over_or_of_another_shape_is_listed(situation: Situation, tmp_path: Path) -> None:
    folder = make_outdated(situation.old_folder, situation.task_folder, tmp_path / "outdated")
    head = load_file(folder / HEAD)
    del head["pooler.dense.bias"]
    head.update({"classifier.bias": torch.zeros(2), "regressor.bias": torch.zeros(1)})
    save_file(head, folder / HEAD, metadata={"format": "pt"})
    write_manifest(folder, read_manifest(folder))
    with pytest.raises(InputError) as caught:
        situation.started(folder)
    assert str(caught.value) == (
        f"{folder}: does not fit the model: classifier.bias is (2,), the model's is (3,); "
        "pooler.dense.bias is missing; regressor.bias has no place in the model"
    )
