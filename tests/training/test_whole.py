"""One rank trains at every stage as plain PyTorch does, and with the numbers that ZeRO's own optimizers would have."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from torch import nn

from recyclable import distributed, machine
from recyclable.config.settings import TrainSettings
from recyclable.objectives.objective import Objective
from recyclable.training import states, whole
from recyclable.training.engine import engine_for
from recyclable.training.pieces import WEIGHT
from recyclable.training.zero import own_pieces

STEPS, MICRO, RATE, DECAY = 5, 4, 1e-2, 0.1
BF16: dict[str, Any] = {"bf16": {"enabled": True}}
FP16: dict[str, Any] = {"fp16": {"enabled": True, "initial_scale_power": 4}}
Weights = dict[str, torch.Tensor]


class Fit(Objective):
    """A small model that has a layer which its loss does not depend on."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.student = nn.ModuleDict(
            {"first": nn.Linear(6, 8), "second": nn.Linear(8, 2), "unused": nn.Linear(3, 3, bias=False)}
        )
        self.weights = {"fit": 1.0}

    def counts(self, batch: Any) -> dict[str, int]:
        return {"fit": len(batch["x"])}

    def sums(self, batch: Any) -> dict[str, torch.Tensor]:
        weight = self.student["first"].weight
        hidden = torch.tanh(self.student["first"](batch["x"].to(weight)))
        return {"fit": (self.student["second"](hidden) - batch["y"].to(weight)).float().pow(2).sum()}


@pytest.fixture(autouse=True)
def one_rank() -> Iterator[None]:
    with distributed.joined():
        yield


@pytest.fixture(autouse=True)
def eager_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """No transformers model is trained here."""
    monkeypatch.setattr("recyclable.training.engine.set_attention", lambda *_: None)
    monkeypatch.setattr("recyclable.training.engine.attention.attention_of", lambda _: "none")


def micro_batches(step: int) -> list[dict[str, torch.Tensor]]:
    made = torch.Generator().manual_seed(step)
    return [{"x": torch.randn(MICRO, 6, generator=made), "y": torch.randn(MICRO, 2, generator=made)} for _ in range(2)]


def settings(out: Path, clip: float) -> TrainSettings:
    more = {"weight_decay": DECAY, "max_grad_norm": clip, "train_batch_size": 2 * MICRO}
    return TrainSettings(out=out, max_steps=STEPS, learning_rate=RATE, **more)


def trained(out: Path, ds_config: dict[str, Any], clip: float = 0.5) -> tuple[Weights, list[float], int]:
    """fp32 weights after some steps, the norms of their gradients, and the stage they were trained at."""
    ds_config = {"train_micro_batch_size_per_gpu": MICRO, **ds_config}
    norms = []
    with engine_for(Fit(), settings(out, clip), ds_config, out) as engine:
        for step in range(STEPS):
            for batch in micro_batches(step):
                engine.backward(engine(batch)["fit"])
                engine.step()
            norms.append(float(engine.get_global_grad_norm()))
        kept = {name: values.clone() for name, _, values in own_pieces(engine.module)}
        for piece in states.copies(engine):
            assert torch.equal(kept[piece.name], piece.tensors[WEIGHT]) and piece.steps == STEPS
        return kept, norms, engine.zero_optimization_stage()


def plainly(dtype: torch.dtype, clip: float) -> tuple[Weights, list[float]]:
    """The same by hand: gradients of the rounded weights step fp32 ones."""
    model, rounded = Fit(), Fit().to(dtype)
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": DECAY},
        {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    for master, half in zip(model.parameters(), rounded.parameters(), strict=True):
        master.data = half.detach().float().clone()
    optimizer, norms = torch.optim.AdamW(groups, lr=RATE, foreach=False), []
    for step in range(STEPS):
        for batch in micro_batches(step):
            (rounded.sums(batch)["fit"] / 2).backward()
        for master, half in zip(model.parameters(), rounded.parameters(), strict=True):
            master.grad = torch.zeros_like(master) if half.grad is None else half.grad.float()
            half.grad = None
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), clip or float("inf"))))
        optimizer.step()
        for master, half in zip(model.parameters(), rounded.parameters(), strict=True):
            half.data.copy_(master)
    return {name: p.detach().reshape(-1) for name, p in model.named_parameters()}, norms


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("clip", [0.0, 0.5])
@pytest.mark.parametrize("precision", [{}, BF16])
def test_one_rank_trains_as_plain_pytorch_does(
    precision: dict[str, Any], clip: float, stage: int, tmp_path: Path
) -> None:
    found, norms, at = trained(tmp_path, {"zero_optimization": {"stage": stage}, **precision}, clip)
    expected, expected_norms = plainly(torch.bfloat16 if precision else torch.float32, clip)
    assert at == 0
    assert norms == pytest.approx(expected_norms, rel=1e-5)
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_fp16_trains_as_plain_pytorch_does(clip: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, which DeepSpeed would not have."""
    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: True)
    monkeypatch.setattr(machine, "machine_is_cpu", lambda: False)
    found, norms, at = trained(tmp_path, FP16, clip)
    expected, expected_norms = plainly(torch.float16, clip)
    assert at == 1
    assert norms == pytest.approx(expected_norms, rel=1e-3)
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("precision", [{}, BF16])
def test_what_zero_itself_would_have_trained_is_trained(
    precision: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, norms, _ = trained(tmp_path, {"zero_optimization": {"stage": 1}, **precision})
    monkeypatch.setattr(machine, "as_run", lambda config, _: config)
    expected, expected_norms, at = trained(tmp_path, {"zero_optimization": {"stage": 1}, **precision})
    assert at == 1
    assert norms == pytest.approx(expected_norms, rel=1e-5)
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values, rtol=1e-5, atol=1e-6)


def test_masters_are_stepped_piece_by_piece_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at_once, *_ = trained(tmp_path, BF16)
    monkeypatch.setattr(whole, "MASTERED_AT_ONCE", 20)
    for name, values in trained(tmp_path, BF16)[0].items():
        assert torch.equal(values, at_once[name])


@pytest.mark.parametrize("precision", [{}, BF16])
def test_an_ended_engine_leaves_parameters_as_they_were(precision: dict[str, Any], tmp_path: Path) -> None:
    objective = Fit()
    with engine_for(objective, settings(tmp_path, 1.0), {**precision, "train_batch_size": 2 * MICRO}, tmp_path):
        pass
    left = {name: {key for key in vars(p) if "master" in key} for name, p in objective.named_parameters()}
    assert left == {name: set() for name in left}


def needs(section: str, **keys: Any) -> dict[str, Any]:
    zero = {"stage": 3, **(keys if section == "zero_optimization" else {})}
    return {section: keys, "zero_optimization": zero}


@pytest.mark.parametrize(
    "ds_config",
    [
        needs("zero_optimization", offload_optimizer={"device": "cpu"}),
        needs("zero_optimization", offload_param={"device": "nvme", "nvme_path": "/nvme"}),
        needs("zero_optimization", zero_quantized_weights=True),
        needs("data_types", grad_accum_dtype="fp32"),
        needs("fp16", enabled=True),
        needs("torch_autocast", enabled=True, dtype="bfloat16"),
        needs("bf16", enabled=True, bf16_master_weights_and_grads=True),
    ],
    ids=str,
)
def test_a_stage_that_does_more_than_share_out_is_run_as_it_is_asked_for(ds_config: dict[str, Any]) -> None:
    assert machine.as_run(ds_config, 1) == ds_config


@pytest.mark.parametrize(("ranks", "stage"), [(1, 0), (2, 3)])
def test_only_one_rank_alone_shares_out_nothing(ranks: int, stage: int) -> None:
    given = {"zero_optimization": {"stage": 3, "offload_param": {"device": "none"}}, **BF16}
    assert machine.zero_stage(machine.as_run(given, ranks)) == stage
    assert machine.zero_stage(given) == 3
