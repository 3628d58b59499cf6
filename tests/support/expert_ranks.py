"""One rank of test_expert_layouts.py: `expert_ranks.py runs.json`, a list of {base, plain} or of what `pretrain` reads.

{base}: starts its language model under ZeRO-3; what went wrong is written to <number>-<rank>.json, "" if nothing did.
{pretrain: run.yaml's settings, ds_config}: a run on all ranks.
"""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from processes import STAGE_3
from transformers import AutoModelForCausalLM

from recyclable import distributed
from recyclable.models.language import language_model
from recyclable.recipes.pretrain import pretrain
from recyclable.recipes.pretrain_settings import read_pretrain_settings
from recyclable.training import zero
from recyclable.weights import digest
from recyclable.weights.base import Base
from recyclable.weights.checkpoint_files import SafetensorsFile

DS_CONFIG = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3, **STAGE_3}}


def started(folder: str) -> None:
    """This rank has its range of each tensor, and has read hardly more than that."""
    read: list[tuple[str, int]] = []
    whole = SafetensorsFile.read_bytes

    def counted(self: SafetensorsFile, name: str, start: int, stop: int) -> np.ndarray:
        read.append((name, stop - start))
        return whole(self, name, start, stop)

    with patch.object(digest, "LEAF", 64):
        model, _ = language_model(Base(folder), "CausalLM", 1, None)
        with patch.object(SafetensorsFile, "read_bytes", counted):
            zero.materialize(model, DS_CONFIG)
    plain = dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())
    kept = 0
    for name, parameter in model.named_parameters():
        want, size = plain[name].detach().reshape(-1), parameter.ds_tensor.numel()
        want = want[distributed.rank() * size : (distributed.rank() + 1) * size]
        assert (parameter.ds_tensor[: len(want)] == want).all(), name
        assert parameter.ds_shape == plain[name].shape and parameter.numel() == 0, name
        kept += len(want) * 4
    assert kept <= sum(nbytes for _, nbytes in read) <= 1.1 * kept, (kept, sum(nbytes for _, nbytes in read))
    largest = max(p.numel() for p in plain.values()) * 4
    assert max(nbytes for _, nbytes in read) <= largest / distributed.world_size() + 64


def main(file: str) -> int:
    distributed.init()
    for number, run in enumerate(json.loads(Path(file).read_text())):
        problem = ""
        try:
            if "base" in run:
                started(run["base"])
            else:
                settings: dict[str, Any] = run["pretrain"]
                pretrain(read_pretrain_settings(settings, file), DS_CONFIG)
        except Exception:
            problem = traceback.format_exc()
        Path(file).with_name(f"{number}-{distributed.rank()}.json").write_text(json.dumps(problem))
        distributed.barrier()
    distributed.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
