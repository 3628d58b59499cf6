"""Every kind of tuning for a task answered in text: through all verbs and the store, and out to plain libraries."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from answers import log_likelihood, make_answers_task, rows_of
from decoders import make_decoder
from peft import PeftModel
from this_process import own_environment
from transformers import AutoModelForCausalLM, AutoTokenizer
from worlds import make_upgraded

from recyclable.api import Store, evaluate, recycle, tune
from recyclable.weights.manifest import read_manifest

KINDS: dict[str, dict[str, Any]] = {
    "bias": {},
    "lora": {"lora_r": 2, "target_modules": "all-linear"},
    "bottleneck": {"bottleneck_size": 4},
    "ia3": {},
    "prefix": {"num_virtual_tokens": 3},
    "prompt": {"num_virtual_tokens": 3},
}
FORMS: dict[str, tuple[bool, ...]] = {"bias": (True,), "lora": (True, False), "ia3": (True, False)}
"""Whether it is exported merged into the base; the others are adapters only."""
STEPS: dict[str, Any] = {"max_steps": 2, "learning_rate": 0.1, "train_batch_size": 8, "save_every": 0, "seed": 5}


class World:
    """A Llama with biases, its upgrade, a task and a store."""

    def __init__(self, root: Path) -> None:
        self.root, self.store = root, Store(root / "store")
        self.task = make_answers_task(root / "task", {"train": 16, "dev": 4, "test": 4})
        self.base = make_decoder(root / "base", "llama", attention_bias=True, mlp_bias=True)
        self.up = make_upgraded(self.base, root / "up")
        self.rows = rows_of(self.task / "test.jsonl")

    def plain(self, folder: Path) -> Any:
        return AutoModelForCausalLM.from_pretrained(folder).eval()

    def log_likelihood(self, model: Any) -> float:
        return log_likelihood(model, AutoTokenizer.from_pretrained(self.base), self.rows)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with own_environment():
        yield World(tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize("tuning", KINDS)
def test_every_kind_of_tuning_goes_through_all_verbs_and_the_store(world: World, tuning: str, tmp_path: Path) -> None:
    weights, task, up = tmp_path / "weights", str(world.task), str(world.up)
    tune(base=str(world.base), task=task, out=str(weights), tuning=tuning, max_length=24, **STEPS, **KINDS[tuning])
    told = {"weights": str(weights), "old_base": str(world.base), "base": up, "task": task}
    for method in ("apply", "both"):
        out, name = tmp_path / method, f"{tuning}-{method}"
        found = recycle(method=method, out=str(out), **told, **({} if method == "apply" else STEPS))
        assert read_manifest(out).kind == read_manifest(weights).kind == ("partial" if tuning == "bias" else "adapter")
        world.store.add(name, out)
        (scored,) = evaluate(name, up, task, store=str(world.store.folder))["runs"]
        assert {f"test_{metric}": value for metric, value in found["test"].items()}.items() <= scored.items()
    for merged in FORMS.get(tuning, (False,)):
        out = tmp_path / f"exported-{merged}"
        world.store.export(name, up, out, merged=merged)
        opened = world.plain(out) if merged else PeftModel.from_pretrained(world.plain(world.up), out).eval()
        assert world.log_likelihood(opened) == pytest.approx(scored["test_log_likelihood"], abs=1e-4)
    alone = world.log_likelihood(world.plain(world.up))
    assert abs(scored["test_log_likelihood"] - alone) > 1e-2, "it does something"
