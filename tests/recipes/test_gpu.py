"""On a GPU every verb that trains does what it does on a CPU: the same losses, step by step, under every ZeRO stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from plain import COMMON
from processes import STAGE_3, finish, outcome, scalars, start
from safetensors.torch import load_file
from worlds import make_adapter, make_base, make_corpus, make_outdated, make_task, make_upgraded

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

TOLERANCE = 2e-4  # relative, at every step, in fp32
TEACHER = {"alpha": 0.6, "beta": 3.0, "temperature": 4.0}
UNTRAINED = {name: COMMON[name] for name in ("seed", "max_length", "eval_batch_size")}


def runs(root: Path, out: Path) -> list[dict[str, Any]]:
    """Every verb, every method that differs in what runs on the device, ZeRO 0 to 3."""
    recycled = {
        "base": root / "upgraded",
        "old_base": root / "base",
        "weights": root / "tuned",
        "task": str(root / "task"),
    }
    told = [
        ("pretrain", 0, {"base": root / "base", "corpus": str(root / "corpus")}),
        ("pretrain", 3, {"base": root / "base", "corpus": str(root / "corpus"), "teacher": str(root / "upgraded")}),
        ("tune", 1, {"base": root / "base", "task": str(root / "task")}),
        ("tune", 3, {"base": root / "base", "task": str(root / "task"), "tuning": "lora"}),
        ("recycle", 2, {**recycled, **TEACHER, "method": "both"}),
        ("recycle", 3, {**recycled, **TEACHER, "method": "distill", "teacher": "online"}),
        ("recycle", 3, {**recycled, **TEACHER, "method": "interpolate"}),
        ("recycle", 3, {**recycled, "method": "apply", "scale": "auto", "strength_examples": 8}),
        ("recycle", 0, {**recycled, "method": "apply", "weights": root / "lora"}),
    ]
    found = []
    for number, (verb, stage, settings) in enumerate(told):
        common = UNTRAINED if settings.get("method") == "apply" else COMMON
        zero = {"stage": stage, **(STAGE_3 if stage == 3 else {})}
        ds_config = {"train_micro_batch_size_per_gpu": 6, "zero_optimization": zero}
        found.append({"verb": verb, "config": {**common, **settings, "out": out / str(number)}, "ds_config": ds_config})
    return found


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """Device -> its finished runs."""
    root = tmp_path_factory.mktemp("gpu")
    make_base(root / "base")
    make_upgraded(root / "base", root / "upgraded")
    make_task(root / "task")
    make_corpus(root / "corpus")
    make_outdated(root / "base", root / "task", root / "tuned")
    make_adapter(root / "base", root / "task", root / "lora", "lora")
    done = {}
    for device, environment in (("cuda", {}), ("cpu", {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"})):
        done[device] = runs(root, root / device)
        with pytest.MonkeyPatch.context() as patch:
            for name, value in {"NVIDIA_TF32_OVERRIDE": "0", **environment}.items():
                patch.setenv(name, value)
            finish(start(root / f"{device}-log", done[device]), root / f"{device}-log")
    return done


def test_the_losses_are_those_of_a_cpu(both: dict[str, list[dict[str, Any]]]) -> None:
    for on_gpu, on_cpu in zip(both["cuda"], both["cpu"], strict=True):
        name = f"{on_gpu['verb']} {on_gpu['config'].get('method')} stage {on_gpu['ds_config']['zero_optimization']}"
        assert outcome(on_gpu["config"]["out"]) == outcome(on_cpu["config"]["out"]) == {}, name
        if "max_steps" in on_gpu["config"]:
            losses = [scalars(run["config"]["out"], "train/loss") for run in (on_gpu, on_cpu)]
            assert losses[0] == pytest.approx(losses[1], rel=TOLERANCE), name


def test_what_is_applied_untrained_is_what_a_cpu_writes(both: dict[str, list[dict[str, Any]]]) -> None:
    for number, file in ((7, "delta.safetensors"), (8, "adapter_model.safetensors")):
        tensors = [load_file(both[device][number]["config"]["out"] / file) for device in ("cuda", "cpu")]
        assert tensors[0].keys() == tensors[1].keys()
        assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])
