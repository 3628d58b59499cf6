"""One rank of test_probe.py: `probe_ranks.py runs.json`, a list of {config, resume}; results go to <out>.json."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from recyclable import distributed
from recyclable.config.run_file import make_config
from recyclable.recipes.probe import probe
from recyclable.recipes.probe_settings import ProbeSettings


def main(file: str) -> int:
    distributed.init()
    for run in json.loads(Path(file).read_text()):
        config = make_config(ProbeSettings, run["config"], file)
        result, _ = probe(config, run.get("resume", False))
        Path(f"{config.out}-{distributed.rank()}.json").write_text(json.dumps(result))
    distributed.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
