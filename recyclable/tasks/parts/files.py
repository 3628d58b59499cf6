"""Find and read the files of a labelled task: a directory, a task file in YAML, or a data set on the hub."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from recyclable.config.settings import Settings
from recyclable.data.bad_rows import BadRow, BadRows
from recyclable.data.files import Row, format_of, read_features, read_rows
from recyclable.data.parquet import label_names, with_names
from recyclable.errors import InputError
from recyclable.tasks import KINDS, every_kind
from recyclable.tasks.parts.columns import Columns, choose
from recyclable.tasks.parts.kind import TaskKind
from recyclable.tasks.parts.task_file import SPLIT_NAMES, check, describe, require_read, settings_of


@dataclass
class Raw:
    """One split as its file has it: what the columns hold, checked, and the row each came from."""

    where: str
    untyped: bool  # CSV and TSV: numbers are strings there
    texts: list[Any] = field(default_factory=list)
    pairs: list[Any] | None = None
    labels: list[Any] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    features: Mapping[str, Any] = field(default_factory=dict)
    """What a file of `datasets` declares of its columns."""
    declared: tuple[str, ...] | None = None
    """The names of the labels, in order, where the file declares them."""

    def place(self, at: int) -> str:
        """Where a row comes from, as messages say it."""
        return f"{self.where}, row {self.places[at]}"

    def keep(self, rows: Sequence[int]) -> None:
        """Only these rows stay, by their indices."""
        for column in (self.texts, self.pairs, self.labels, self.places):
            if column is not None:
                column[:] = [column[at] for at in rows]


Rows = list[Any]
"""[what is known of a split, (place, row) after (place, row) of it]"""


class Source(NamedTuple):
    """A task as its files have it."""

    name: str
    labels: list[Any] | None
    """As the task file lists them."""
    raws: dict[str, Raw]
    """"train" and the other splits there are."""
    kind: TaskKind
    settings: Settings
    """What the task file says to the kind beside the columns (`TaskKind.settings`)."""
    bad: BadRows
    """Which rows are left out, where `bad_rows` is `skip`."""


def read_source(source: str | Path | dict[str, Any]) -> Source:
    """Read a task's files; raises what `load_task` says."""
    where, spec, root = describe(source)
    kinds = [KINDS.get(spec["problem"], where)()] if "problem" in spec else every_kind()
    check(where, spec, kinds)
    bad = BadRows(spec.get("bad_rows", "refuse"))
    if "dataset" in spec:
        name, rows = spec["dataset"], _hub_rows(spec)
    else:
        name = root.name if root != Path() else "task"
        paths = {split: spec[split] for split in SPLIT_NAMES if spec.get(split) is not None}
        rows = {split: _file_rows(root / Path(path).expanduser(), bad) for split, path in paths.items()}
    if "train" not in rows:
        wanted = "the key `train` or a file train.jsonl, .json, .csv, .tsv, .conll or .parquet"
        raise InputError(where, f"no train split, expected {wanted}")
    layout = choose((layout for kind in kinds for layout in kind.layouts), spec, _first(rows["train"]))
    require_read(where, spec, kinds, layout)
    kinds = [kind for kind in kinds if layout in kind.layouts]
    if "labels" in spec:
        if not any(kind.has_labels for kind in kinds):
            raise InputError(where, f"labels are for classes, but problem is {kinds[0].name}")
        kinds = [kind for kind in kinds if kind.has_labels]
    raws = {split: _collect(raw, of, layout.named(spec), spec, bad) for split, (raw, of) in rows.items()}
    kind = max(kinds, key=lambda kind: kind.claims(raws["train"]))
    for raw in raws.values():
        _require_rows(raw, kind, bad)
    having_pairs = {split for split, raw in raws.items() if raw.pairs is not None}
    if having_pairs and having_pairs != set(raws):
        lacking = next(raw for split, raw in raws.items() if split not in having_pairs)
        raise InputError(lacking.where, "no second text, but other splits have one")
    return Source(str(spec.get("name", name)), spec.get("labels"), raws, kind, settings_of(where, spec, kind), bad)


def files_of_task(source: str | Path | dict[str, Any]) -> list[Path]:
    """The files that a task is read from, a task file among them; none of a data set on the hub."""
    where, spec, root = describe(source)
    own = [Path(where)] if Path(where).is_file() else []
    if "dataset" in spec:
        return own
    return own + [root / Path(str(spec[split])).expanduser() for split in SPLIT_NAMES if spec.get(split) is not None]


def _first(train: Rows) -> dict[str, Any]:
    """The first row, which is left where it is; empty where there is none."""
    _, rows = train
    first = next(rows, None)
    if first is None:
        return {}
    train[1] = chain([first], rows)
    return first[1]


def _file_rows(path: Path, bad: BadRows) -> Rows:
    suffix = format_of(path)
    if suffix is not None and suffix.startswith(".txt"):
        raise InputError(path, "a .txt file has no labels, expected .jsonl, .json, .csv, .tsv, .conll or .parquet")
    untyped = suffix is not None and suffix[1:4] in ("csv", "tsv")
    return [Raw(str(path), untyped, features=read_features(path)), read_rows(path, bad=bad)]


def _hub_rows(spec: dict[str, Any]) -> dict[str, Rows]:
    from recyclable.data.hub import load_hub, pick_split  # slow to import, and files do not need it

    name, found = spec["dataset"], {}
    data = load_hub(name)
    for split, usual in SPLIT_NAMES.items():
        chosen = spec[split] if split in spec else next((known for known in usual if known in data), None)
        if chosen is not None:
            part = pick_split(data, name, chosen)
            rows = ((number, with_names(row, part.features)) for number, row in enumerate(part, 1))
            found[split] = [Raw(f"{name}, split {chosen}", untyped=False, features=part.features), rows]
    return found


def _collect(raw: Raw, rows: Iterable[Row], columns: Columns, spec: Mapping[str, Any], bad: BadRows) -> Raw:
    """Fill `raw`.

    Args:
        columns: by the names they have here.
        spec: second texts whose column it names are there, else where the first row has them.
    """
    raw.declared = None if columns.label is None else label_names(raw.features.get(columns.label.name))
    for place, row in rows:
        with bad:
            _add(raw, place, row, columns, spec)
    _require_some(raw, bad)
    return raw


def _require_rows(raw: Raw, kind: TaskKind, bad: BadRows) -> None:
    """Keep what the kind takes for its rows."""
    kept = []
    for at in range(len(raw.places)):
        with bad:
            kind.require_row(raw, at)
            kept.append(at)
    raw.keep(kept)
    _require_some(raw, bad)


def _require_some(raw: Raw, bad: BadRows) -> None:
    if not raw.texts:
        problem = "this split is empty, expected at least one example"
        raise InputError(raw.where, f"{problem}; {bad}" if bad.counts else problem)


def _add(raw: Raw, place: int, row: dict[str, Any], columns: Columns, spec: Mapping[str, Any]) -> None:
    """Add a row to `raw`; BadRow for one that cannot be used."""
    text, pair, label = columns.text, columns.pair, columns.label
    where, pairs = f"{raw.where}, row {place}", raw.pairs
    if pair is not None and not raw.texts and (pair.needed or pair.name in row or pair.key in spec):
        pairs = []
    elif pair is not None and raw.pairs is None and pair.name in row:
        problem = f"column {pair.name!r} is new here, expected it in every row or in none"
        raise BadRow(where, problem, f"column {pair.name!r} not in every row")
    found = {}
    for column in columns.every:
        if column is pair and pairs is None:
            continue
        if column.name not in row:
            hint = f"name it in task.yaml, as `{column.key}: COLUMN`"
            problem = f"no column {column.name!r}, found {sorted(row)}; {hint}"
            raise BadRow(where, problem, f"no column {column.name!r}")
        found[column.key] = column.holds.read(raw.where, place, column.name, row[column.name])
    raw.texts.append(found[text.key])
    raw.labels.append(None if label is None else found[label.key])
    raw.places.append(place)
    raw.pairs = pairs
    if pair is not None and pairs is not None:
        pairs.append(found[pair.key])
