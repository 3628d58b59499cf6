"""One rank that opens a corpus as training would: `text_ranks.py runs.json`, a list of {config, cache, flip, told}.

`cache`: what each rank's cache is called, but for `{rank}` in it. `flip`: the rank that turns a bit of what lies packed
there first, if any. What a rank opened goes to `told`-rank.json: the digest, the
tokens of all training sequences, and which packed files it has read for their digests.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import datasets

from recyclable import distributed
from recyclable.data import packed
from recyclable.data.packing import cache_root
from recyclable.recipes.pretrain_settings import read_pretrain_settings
from recyclable.recipes.pretrain_text import read_text
from recyclable.weights.base import Base
from recyclable.weights.vocabulary import load_tokenizer


def main(file: str) -> None:
    distributed.init()
    for run in json.loads(Path(file).read_text()):
        datasets.config.HF_DATASETS_CACHE = run["cache"].format(rank=distributed.rank())
        if run["flip"] == distributed.rank():
            (path,) = cache_root().rglob(packed.IDS)
            data = bytearray(path.read_bytes())
            data[-1] ^= 1
            path.write_bytes(data)
        distributed.barrier()
        Path(f"{run['told']}-{distributed.rank()}.json").write_text(json.dumps(opened(run["config"])))
        distributed.barrier()
    distributed.shutdown()


def opened(config: dict[str, Any]) -> dict[str, Any]:
    """What this rank has of a run's corpus."""
    kind, base = read_pretrain_settings(config, "run.yaml"), Base(Path(config["base"]))
    read: list[str] = []
    whole = packed.blake3_file
    with patch.object(packed, "blake3_file", lambda path: (read.append(path.name), whole(path))[1]):
        text = read_text(kind, base, load_tokenizer(base.folder))
    rows = [text.training.batch([(0, i)])["input_ids"].tolist() for i in range(len(text.training))]
    return {"digest": text.reads["corpus"], "rows": rows, "read": read}


if __name__ == "__main__":
    main(sys.argv[1])
