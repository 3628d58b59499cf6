"""What marks a checkpoint as whole and says what it is of: `complete.json`, checked field by field when it is read."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, FiniteFloat, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from recyclable.errors import InputError
from recyclable.weights.durable import write_json
from recyclable.weights.hashes import sha256_json
from recyclable.weights.strict_json import read_json

MARK = "complete.json"
_NO_JSON = ("nan", "inf", "-inf")
_CHECKED = ConfigDict(extra="forbid", strict=True)


def _number(value: Any) -> Any:
    """JSON has no such numbers: they are written as text."""
    return float(value) if value in _NO_JSON else value


def _row(row: dict[str, int | float]) -> dict[str, int | float]:
    if missing := {"step", "examples", "seconds"} - row.keys():
        raise ValueError(f"lacks {sorted(missing)}")
    return row


Number = Annotated[int | float, BeforeValidator(_number)]
Score = int | FiniteFloat
"""Of weights that are damaged there is none: their run has ended."""
Count = Annotated[int, Field(ge=0)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


@dataclass(config=_CHECKED)
class Progress:
    """What a run has done so far; all of it goes into checkpoints."""

    step: Count = 0
    seconds: Annotated[float, Field(ge=0)] = 0.0
    """Spent on training steps, evaluation left out."""
    best_step: int = -1
    best: Score | None = None
    best_digest: Digest | None = None
    """Of the file with the best step's weights (`weights.digest.file_digest`)."""
    history: list[Annotated[dict[str, Score], AfterValidator(_row)]] = field(default_factory=list)
    """One row per evaluation: step, examples, seconds and the scores."""
    skipped: list[Count] = field(default_factory=list)
    """Steps that were left out as bad (`training.health`), counted from 1."""
    overflows: Count = 0
    """Steps that only changed the loss scale (fp16)."""
    recent: list[Number] = field(default_factory=list)
    """Losses of the last steps, where spikes are looked for."""

    def scored(self, scores: Mapping[str, float], batch: int) -> None:
        """Add a row to the history: what the run scores now, after steps of `batch` examples."""
        done = {"step": self.step, "examples": (self.step - len(self.skipped)) * batch, "seconds": self.seconds}
        left_out = {"skipped": len(self.skipped)} if self.skipped else {}
        self.history.append({**done, **left_out, **scores})


@dataclass(config=_CHECKED)
class RankFile:
    """A file of a checkpoint."""

    bytes: Count
    blake3: Digest


@dataclass(config=_CHECKED)
class Record:
    """A checkpoint; `ranks` and `files` are its own, `zero_stage` and `precision` tell and bind nobody.

    `micro_batch` is kept to where no ds_config names one.
    """

    progress: Progress
    reads: dict[str, str]
    """What the run reads, by what it calls it -> content digest."""
    layout: dict[str, list[Count]]
    """Name -> full shape of every parameter that is trained."""
    scaling: dict[str, Number]
    """`training.states.scaling`."""
    zero_stage: Count
    precision: str
    ranks: Annotated[int, Field(ge=1)]
    micro_batch: Annotated[int, Field(ge=1)]
    files: dict[str, RankFile] = field(default_factory=dict)
    runs: dict[str, Progress] = field(default_factory=dict)
    """Of a stack of adapters: name -> what it has done so far."""


_RECORD = TypeAdapter(Record)


def rank_file(rank: int) -> str:
    """Name of a rank's file."""
    return f"rank-{rank:05d}.safetensors"


def write_record(folder: Path, record: Record) -> None:
    """Mark a checkpoint as whole; its own digest is in the record."""
    content = _as_json(asdict(record))
    write_json(folder / MARK, {**content, "digest": sha256_json(content)})


def read_record(folder: Path) -> Record:
    """The record of a checkpoint `step-N`; InputError when it is missing, broken, or another step's."""
    if not (folder / MARK).is_file():
        raise InputError(folder, f"lacks {MARK}, which would mark it as whole")
    content = read_json(folder / MARK, finite=True)
    if content.pop("digest", None) != sha256_json(content):
        raise InputError(folder / MARK, "was changed after it was written, or was written by another version")
    try:
        record = _RECORD.validate_json(json.dumps(content))  # as JSON: in Python a strict record wants records inside
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(folder / MARK, f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    for progress in (record.progress, *record.runs.values()):
        if progress.best_step not in (-1, *(row["step"] for row in progress.history)):
            raise InputError(folder / MARK, f"says nothing of what its best step, {progress.best_step}, scored")
    if folder.name != f"step-{record.progress.step:08d}":
        raise InputError(folder / MARK, f"is of step {record.progress.step}")
    if len(record.files) != record.ranks or record.files.keys() != set(map(rank_file, range(record.ranks))):
        raise InputError(
            folder / MARK, f"files is {list(record.files)[:3]}, expected one of each of {record.ranks} ranks"
        )
    return record


def _as_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _as_json(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_as_json(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
