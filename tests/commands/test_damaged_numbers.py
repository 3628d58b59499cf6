"""Weights with NaN in them are refused by file and tensor; what training ruins is never written as a result."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from verbs import Verbs
from worlds import make_adapter, make_base, make_corpus, make_outdated, make_task, make_upgraded

from recyclable.errors import RunError
from recyclable.training.monitor import Monitor
from recyclable.weights.durable import write_json
from recyclable.weights.finite import is_finite

NAME = "bert.encoder.layer.1.output.dense.weight"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("numbers")
    base, task = make_base(root / "base"), make_task(root / "task")
    make_upgraded(base, root / "upgraded")
    make_corpus(root / "corpus", documents=20)
    make_outdated(base, task, root / "outdated")
    make_adapter(base, task, root / "adapter", "lora")
    for name in ("base", "upgraded"):
        spoil(Path(shutil.copytree(root / name, root / f"nan-{name}")) / "model.safetensors", NAME)
    return root


def spoil(file: Path, name: str, value: float = float("nan")) -> None:
    """One number of a tensor is none any more."""
    tensors = load_file(file)
    tensors[name].view(-1)[tensors[name].numel() // 2] = value
    save_file(tensors, file, {"format": "pt"})


@pytest.fixture
def verbs(tmp_path: Path, capsys: pytest.CaptureFixture) -> Verbs:
    return Verbs(tmp_path, capsys)


@pytest.mark.parametrize("verb", ["pretrain", "tune", "recycle", "apply", "evaluate"])
def test_a_base_with_a_nan_is_refused_by_tensor_and_file(world: Path, verbs: Verbs, verb: str) -> None:
    bad, task = world / "nan-base", world / "task"
    if verb == "pretrain":
        argv = verbs.training(verb, base=bad, corpus=str(world / "corpus"))
    elif verb == "tune":
        argv = verbs.training(verb, base=bad, task=task)
    elif verb == "recycle":
        bad = world / "nan-upgraded"
        given = {"base": bad, "old_base": world / "base", "weights": world / "outdated", "task": task}
        argv = verbs.training(verb, **given, method="init", allow_unrelated=True)
    elif verb == "apply":
        bad = world / "nan-upgraded"
        argv = [
            "apply",
            "--weights",
            world / "outdated",
            "--base",
            bad,
            "--old-base",
            world / "base",
            "--allow-unrelated",
        ]
        argv += ["--out", verbs.out]
    else:
        argv = ["evaluate", "--weights", world / "outdated", "--base", bad, "--task", task]
    line = verbs.refused(*argv)
    assert f"{bad / 'model.safetensors'}: {NAME} holds NaN or infinity" in line


@pytest.mark.parametrize(
    ("weights", "file"), [("outdated", "delta"), ("outdated", "head"), ("adapter", "adapter_model")]
)
def test_weights_with_a_nan_are_refused_by_tensor_and_file(
    world: Path, verbs: Verbs, tmp_path_factory: pytest.TempPathFactory, weights: str, file: str
) -> None:
    bad = Path(shutil.copytree(world / weights, tmp_path_factory.mktemp("bad") / weights))
    path = bad / f"{file}.safetensors"
    name = next(name for name in sorted(load_file(path)) if "::" not in name)
    spoil(path, name, float("-inf"))
    line = verbs.refused("evaluate", "--weights", bad, "--base", world / "base", "--task", world / "task")
    assert f"{path}: {name} holds NaN or infinity" in line


@pytest.mark.parametrize("verb", ["pretrain", "tune"])
def test_a_rate_that_ruins_the_weights_ends_without_a_result(world: Path, verbs: Verbs, verb: str) -> None:
    """They stay finite in fp32: what they compute is not."""
    of = {"corpus": str(world / "corpus")} if verb == "pretrain" else {"task": world / "task"}
    settings = {"base": world / "base", "learning_rate": 1e38, "max_steps": 6, "eval_every": 6}
    status, said = verbs.run(*verbs.training(verb, **settings, **of))
    assert status == 1 and len(said) == 1 and said[0].startswith("recyclable: error: step "), said
    assert not [path for path in verbs.out.glob("*") if path.name in ("lineage.json", "manifest.json")]
    assert not list(verbs.out.glob("model*")) and not list(verbs.out.glob("delta*"))


def test_a_rate_that_ruins_the_last_step_ends_without_a_result(world: Path, verbs: Verbs) -> None:
    """No step comes after it that would see what became of the weights."""
    settings = {"base": world / "base", "learning_rate": 1e38, "max_steps": 1, "corpus": str(world / "corpus")}
    status, said = verbs.run(*verbs.training("pretrain", **settings))
    assert status == 1 and len(said) == 1 and "there is no result" in said[0], said
    assert not verbs.out.exists(), "nothing of it is worth keeping"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_numbers_that_are_none_are_found_in_every_dtype(dtype: torch.dtype) -> None:
    values = torch.randn(1000).to(dtype)
    assert is_finite(values) and is_finite(values[:0]) and is_finite(torch.tensor([1 << 40]))
    for bad in (float("nan"), float("inf"), float("-inf")):
        broken = values.float()
        broken[617] = bad
        assert is_finite(broken.to(dtype)) == bool(torch.isfinite(broken.to(dtype).float()).all())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_json_never_holds_a_number_that_is_none(tmp_path: Path, value: float) -> None:
    with pytest.raises(RunError, match=rf"heldout\.after\.1\.loss is {value}, expected a finite number"):
        write_json(tmp_path / "lineage.json", {"heldout": {"after": [{}, {"loss": value}]}})
    assert not list(tmp_path.iterdir())


def test_a_bit_of_the_best_weights_that_flips_under_a_run_is_noticed(
    world: Path, verbs: Verbs, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = Monitor.step

    def flip(self: Monitor, step: int, *losses: Any) -> None:
        taken(self, step, *losses)
        for file in verbs.out.glob("best-00000000.safetensors"):
            data = bytearray(file.read_bytes())
            data[-100] ^= 1
            file.write_bytes(data)

    monkeypatch.setattr(Monitor, "step", flip)
    settings = {"base": world / "base", "task": world / "task", "learning_rate": 1e-30}  # no step is better than 0
    status, said = verbs.run(*verbs.training("tune", **settings))
    assert (status, len(said)) == (1, 1), said
    assert "best-00000000.safetensors: was changed after it was written" in said[0]
    assert not (verbs.out / "manifest.json").exists()
