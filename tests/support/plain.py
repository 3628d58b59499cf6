"""The oracle of tests that train: training in plain PyTorch, its settings, and a run's results in its names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from torch.func import functional_call

STEPS, WARMUP, BATCH, SEED, LENGTH = 20, 4, 12, 7, 24
RATE, DECAY, CLIP, BETAS, EPSILON = 5e-3, 0.1, 0.5, (0.9, 0.99), 1e-6
ALPHA, BETA, TEMPERATURE = 0.6, 3.0, 4.0
ADAPTER_RATE = 2e-2
SHARE, POINTS = 0.4, (0.3, 0.7)  # of interpolation
LOSS_TOLERANCE = 1e-4  # relative, at every step
WEIGHT_TOLERANCE = 1e-4  # absolute, after 20 steps of up to 5e-3 each

COMMON = {
    "max_steps": STEPS,
    "train_batch_size": BATCH,
    "learning_rate": RATE,
    "warmup_steps": WARMUP,
    "weight_decay": DECAY,
    "adam_beta1": BETAS[0],
    "adam_beta2": BETAS[1],
    "adam_epsilon": EPSILON,
    "max_grad_norm": CLIP,
    "seed": SEED,
    "max_length": LENGTH,
    "dropout": 0.0,
    "eval_every": STEPS,
    "eval_batch_size": 7,
    "save_every": 0,
    "log_every": 1,
}


def plain_training(
    model: nn.Module, trainable: list[str], loss_of: Callable[[int], torch.Tensor], rate: float, warmup: int, steps: int
) -> list[float]:
    """`steps` steps of AdamW with linear warm-up and decay in the manner of a tutorial; the loss of each."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trainable)
    decayed = {n: p for n, p in model.named_parameters() if n in trainable and p.dim() > 1}  # no biases, no norms
    rest = [p for n, p in model.named_parameters() if n in trainable and n not in decayed]
    groups = [{"params": list(decayed.values()), "weight_decay": DECAY}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=BETAS, eps=EPSILON)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda t: (t + 1) / warmup if t < warmup else (steps - t) / (steps - warmup)
    )
    losses = []
    model.eval()  # dropout off
    for step in range(steps):
        loss = loss_of(step)
        losses.append(loss.item())
        loss.backward()
        nn.utils.clip_grad_norm_([*decayed.values(), *rest], CLIP)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return losses


def short(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """By names without the prefix of the model, and without what PEFT puts between the parts of a name."""

    def plain(name: str) -> str:
        name = name.replace(".modules_to_save", "").replace(".default", "")
        return name.removeprefix("base_model.model.").removeprefix("bert.")

    return {plain(name): tensor.detach().clone() for name, tensor in tensors.items()}


def at(x: float, student: nn.Module, fixed: nn.Module, batch: dict[str, torch.Tensor]) -> Any:
    """What the student answers with x own + (1 - x) fixed weights, all of them mixed beforehand."""
    ends = dict(student.named_parameters()), dict(fixed.named_parameters())
    assert ends[0].keys() == ends[1].keys()
    mixed = {name: x * own + (1 - x) * ends[1][name].detach() for name, own in ends[0].items()}
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    return functional_call(student, mixed, kwargs={**inputs, "output_hidden_states": True})


def saved_tensors(out: Path, base: Path) -> dict[str, torch.Tensor]:
    """The values a run learned, from the files that users get, by the oracle's names."""
    if (out / "model.safetensors").is_file():
        saved = short(load_file(out / "model.safetensors"))
        return {
            name: tensor for name, tensor in saved.items() if not name.startswith("pooler.")
        }  # goes along untrained
    for adapter in (out / "adapter_model.safetensors", out / "lora.safetensors"):
        if adapter.is_file():
            return short(load_file(adapter))
    theta = short(load_file(base / "model.safetensors"))
    delta = load_file(out / "delta.safetensors")
    tuned = {
        name: theta[name] + d for name, d in delta.items() if "::" not in name
    }  # without its last bit's corrections
    return {**tuned, **load_file(out / "head.safetensors")}


def largest_difference(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    assert found.keys() == expected.keys()
    assert {n: t.shape for n, t in found.items()} == {n: t.shape for n, t in expected.items()}
    return max((found[name] - expected[name]).abs().max().item() for name in found)
