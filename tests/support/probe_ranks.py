"""One rank of test_probe.py: `probe_ranks.py runs.json`, a list of {config, resume}; results go to <out>.json."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from recyclable.config import make_config
from recyclable.recipes.probe import ProbeConfig, probe
from recyclable.training import distributed


def main(file: str) -> int:
    distributed.init()
    for run in json.loads(Path(file).read_text()):
        config = make_config(ProbeConfig, run["config"], file)
        result, _ = probe(config, run.get("resume", False))
        Path(f"{config.out}-{distributed.rank()}.json").write_text(json.dumps(result))
    distributed.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
