"""One rank of many evaluations in one process group: `evaluation_ranks.py runs.json`, a list of {weights, base, task}.

The model is partitioned over the ranks. What each evaluation says is written to rows.json beside runs.json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from processes import NOTHING_WHOLE

from recyclable import distributed
from recyclable.recipes.evaluate import evaluate_all


def main(file: str) -> int:
    distributed.init()
    ds_config, rows = {"zero_optimization": {"stage": 3, **NOTHING_WHOLE}}, []
    for run in json.loads(Path(file).read_text()):
        weights, base, task = [Path(run["weights"])], run["base"], run["task"]
        rows += evaluate_all(weights, base, task, old_base=None, split="test", ds_config=ds_config)
    if distributed.is_main():
        Path(file).with_name("rows.json").write_text(json.dumps(rows))
    distributed.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
