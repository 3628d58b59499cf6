"""Rows to files in every format that text and tasks may come in."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pandas as pd


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write rows to a file in the format of its name; returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    name = path.name.removesuffix(".gz")
    if name.endswith(".parquet"):
        pd.DataFrame(rows).to_parquet(path, index=False)
        return path
    if name.endswith(".txt"):
        content = "".join(row["text"] + "\n" for row in rows)
    elif name.endswith(".jsonl"):
        content = "".join(json.dumps(row) + "\n" for row in rows)
    elif name.endswith(".json"):
        content = json.dumps(rows, indent=1)
    else:
        content = pd.DataFrame(rows).to_csv(index=False, sep="\t" if name.endswith(".tsv") else ",")
    data = content.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path
