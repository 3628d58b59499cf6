"""One rank of test_generation.py: `generation_ranks.py runs.json`, a list of {family, adapter, drawn, zero}.

Each run's answers, the likeliest and those drawn, are written to answers-<rank>.json beside runs.json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from generating import NEW, PROMPTS, adapted, made, rules
from torch import nn

from recyclable import distributed
from recyclable.data.decoding import Decoding
from recyclable.training.engine import frozen
from recyclable.training.generation import Generating, generate


class Watched(Generating):
    """Notes how many of the parameters' elements a rank ever has at once, whenever a layer computes."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.most = 0
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.register_forward_hook(self._note)

    def _note(self, *_: Any) -> None:
        self.most = max(self.most, sum(parameter.numel() for parameter in self.model.parameters()))


def answered(family: str, adapter: str | None, drawn: dict[str, Any], zero: dict[str, Any]) -> list[list[list[int]]]:
    model = made(family) if adapter is None else adapted(family, adapter)
    whole = sum(parameter.numel() for parameter in model.parameters())
    module, greedy = Watched(model), Decoding(NEW)
    with frozen(module, {"zero_optimization": zero}) as (inside, device):
        few = generate(inside, PROMPTS[2:3], greedy, rules(model), 2, device)  # none for the other rank
        told = [
            generate(inside, PROMPTS, greedy, rules(model), 2, device),
            generate(inside, PROMPTS, Decoding(NEW, **drawn), rules(model), 3, device),
        ]
    assert few == told[0][2:3]
    assert 0 < module.most <= (0.7 * whole if zero["stage"] == 3 else whole), (module.most, whole)
    return told


def main(file: str) -> int:
    distributed.init()
    torch.set_num_threads(1)
    told = [answered(**run) for run in json.loads(Path(file).read_text())]
    Path(file).with_name(f"answers-{distributed.rank()}.json").write_text(json.dumps(told))
    distributed.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
