"""Bytes that each rank really sends in an optimizer step, collective by collective, as PyTorch is asked for them."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch
from plan import _forked, make_base, make_texts
from torch.utils._python_dispatch import TorchDispatchMode

from recyclable import machine
from recyclable.planning.communication import said
from recyclable.planning.states import Sizes
from recyclable.recipes.planned import planned
from recyclable.recipes.pretrain_settings import read_pretrain_settings

RUN = {"max_length": 32, "train_batch_size": 8, "max_steps": 3, "learning_rate": 1e-4, "save_every": 0}
RUN |= {"eval_every": 100, "eval_batch_size": 4}
SMALL = 4096
"""Bytes up to which a collective is no weights' or gradients': counts of tokens, norms, flags."""
_LARGE = {  # c10d's collective -> (which argument is whole on every rank or of each, how often a ring moves it)
    "allreduce_": (0, 2),
    "reduce_": (0, 1),
    "broadcast_": (0, 1),
    "_allgather_base_": (0, 1),
    "allgather_": (0, 1),
    "allgather_into_tensor_coalesced_": (0, 1),
    "_reduce_scatter_base_": (1, 1),
    "reduce_scatter_": (1, 1),
    "reduce_scatter_tensor_coalesced_": (1, 1),
}


class Counting(TorchDispatchMode):
    """Notes every collective that goes through PyTorch while it lasts, whoever asks for it.

    `sent` counts bytes by collective and dtype, as a ring of so many ranks has each of them send on average.
    """

    def __init__(self, ranks: int) -> None:
        super().__init__()
        self.ranks, self.sent, self.calls = ranks, Counter[str](), Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = func._overloadpacket
        if packet._qualified_op_name.startswith("c10d::") and (name := packet.__name__) not in ("barrier", "monitored"):
            place, times = _LARGE[name]
            tensors = _flat(args[place])
            size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
            key = f"{name.strip('_')} {str(tensors[0].dtype).removeprefix('torch.')}" if size > SMALL else "small"
            self.sent[key] += times * size * (self.ranks - 1) / self.ranks
            self.calls[key] += 1
        return func(*args, **(kwargs or {}))


def _flat(given: Any) -> list[torch.Tensor]:
    return [given] if isinstance(given, torch.Tensor) else [tensor for each in given for tensor in _flat(each)]


def count(model: dict[str, Any], ds_configs: dict[str, dict[str, Any]], ranks: int = 2) -> list[dict[str, Any]]:
    """A row per ds_config: `sent`, `calls` of a rank's last step by collective, and `theory`, bytes.

    All of them are runs of one start, on as many ranks.
    """
    with TemporaryDirectory() as name:
        (Path(name) / "all.json").write_text(json.dumps({"model": model, "ds_configs": ds_configs, "ranks": ranks}))
        return _forked(counted, Path(name), ranks)[0]


def counted(folder: Path) -> list[dict[str, Any]]:
    """On each rank: run each ds_config and count its last step."""
    import deepspeed

    from recyclable import distributed
    from recyclable.recipes.pretrain import pretrain

    told = json.loads((folder / "all.json").read_text())
    ranks = told["ranks"]
    if distributed.is_main():
        make_base(folder / "base", told["model"])
        make_texts(folder, RUN["max_length"], RUN["train_batch_size"])
    distributed.barrier()
    counting, step = Counting(ranks), deepspeed.DeepSpeedEngine.step
    last: dict[str, dict[str, float]] = {}

    def noted(engine: Any, *given: Any, **more: Any) -> Any:
        boundary = engine.is_gradient_accumulation_boundary()
        done = step(engine, *given, **more)
        if boundary:
            last.update(sent=dict(counting.sent), calls=dict(counting.calls))
            counting.sent.clear()
            counting.calls.clear()
        return done

    rows = []
    for name, ds_config in told["ds_configs"].items():
        settings = read_pretrain_settings({**_run(folder), "out": str(folder / f"out {name}")}, "benchmark")
        given = {"train_micro_batch_size_per_gpu": RUN["train_batch_size"] // ranks, "tensorboard": {"enabled": False}}
        with patch.object(deepspeed.DeepSpeedEngine, "step", noted), counting:
            pretrain(settings, {**given, **ds_config})
        rows.append({"name": name, **last, "theory": theory(settings, {**given, **ds_config}, ranks)})
    return rows


def theory(settings: Any, ds_config: dict[str, Any], ranks: int) -> dict[str, float]:
    """What a rank is to send in a step, as `plan` has it, and as Rajbhandari et al. 2020 (section 7) have it."""
    sizes = Sizes.of(planned(settings).objective)
    micro = settings.train_batch_size // ranks // ds_config["train_micro_batch_size_per_gpu"]
    size = 4 if machine.precision(ds_config) == "float32" else 2
    weights = size * sum(sizes.trained.values()) * (ranks - 1) / ranks
    volumes = {0: 2, 1: 2, 2: 1 + micro, 3: 3 * micro}
    return {
        "plan": said(sizes, ds_config, ranks, micro).bytes(size, ranks),
        "zero": volumes[machine.zero_stage(ds_config)] * weights,
        "weights": weights,
    }


def _run(folder: Path) -> dict[str, Any]:
    corpus = {"train": str(folder / "corpus.txt"), "heldout": str(folder / "heldout.txt")}
    return {"base": str(folder / "base"), "corpus": corpus, **RUN}
