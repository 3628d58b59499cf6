"""Mixtures of experts in both layouts: as `save_pretrained` writes them, and as today's model has its tensors."""

from __future__ import annotations

import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM


def fused(folder: Path, to: Path) -> Path:
    """A copy of a model's directory whose file has today's model's own tensors; returns `to`."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    shutil.copytree(folder, to)
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    assert tensors.keys() != load_file(folder / "model.safetensors").keys(), "there are two layouts"
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    return to
