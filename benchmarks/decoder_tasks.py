"""Three small tasks for a decoder, one of each kind, made from public text classification sets.

    python benchmarks/decoder_tasks.py --out tasks [--data DIR]

`--data` (or the variable RECYCLABLE_DATA) names a directory with `tasks/NAME/{train,dev,test}.jsonl.gz` of rows
{"text", "label"}. What is written, below `--out`:
- `cite`, of kind `generation`: SciCite as conversations, {"messages"}: the system turn asks why the user's sentence
  cites, the assistant answers in one of three short sentences, so that exact match means something;
- `film`, of kind `choice`: film reviews (MR), {"prompt", "choices", "answer"}: the sentence with the beginning of a
  verdict, and two ends of it;
- `trec`, of kind `classification`: questions and what they ask for, {"text", "label"}, as they are.
Each split is a random part of the set's own, drawn with a fixed seed.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

Row = dict[str, Any]
SEED = 0
SIZES = {"train": 480, "dev": 48, "test": 200}

ASKED = "Say in one short sentence why the text cites other work."
ANSWERS = {
    "background": "It gives background.",
    "method": "It uses a method.",
    "result": "It compares results.",
}
VERDICT, ENDS = "\nAll in all, the film is", {"neg": " bad.", "pos": " good."}


def cite(row: Row) -> Row:
    """A citing sentence and what the citation is for, as a conversation."""
    turns = {"system": ASKED, "user": row["text"], "assistant": ANSWERS[row["label"]]}
    return {"messages": [{"role": role, "content": content} for role, content in turns.items()]}


def film(row: Row) -> Row:
    """A sentence about a film and two verdicts."""
    return {
        "prompt": row["text"] + VERDICT,
        "choices": list(ENDS.values()),
        "answer": list(ENDS).index(row["label"]),
    }


TASKS: dict[str, tuple[str, Callable[[Row], Row]]] = {
    "cite": ("scicite", cite),
    "film": ("mr", film),
    "trec": ("trec", lambda row: row),
}


def main() -> None:
    """Write the three."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--data", type=Path, metavar="DIR", default=os.environ.get("RECYCLABLE_DATA"))
    arguments = parser.parse_args()
    if arguments.data is None:
        parser.error("name the data with --data or RECYCLABLE_DATA")
    for name, (source, change) in TASKS.items():
        write(Path(arguments.data) / "tasks" / source, arguments.out / name, change)


def write(source: Path, out: Path, change: Callable[[Row], Row]) -> None:
    """Part of each split of one set, its rows changed."""
    out.mkdir(parents=True, exist_ok=True)
    for split, size in SIZES.items():
        with gzip.open(source / f"{split}.jsonl.gz", "rt", encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
        chosen = random.Random(SEED).sample(rows, size)
        lines = (json.dumps(change(row), ensure_ascii=False) + "\n" for row in chosen)
        (out / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
