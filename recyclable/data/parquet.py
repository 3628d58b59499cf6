"""Rows of Parquet files, batch by batch; a row group that is damaged, or a row that nothing can read, is a bad one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from recyclable.data.bad_rows import BadRow
from recyclable.errors import InputError

_BATCH = 1000
_DAMAGE = (pa.ArrowException, OSError, ValueError, OverflowError)
"""What pyarrow raises of pages that are not what they should be, and of values that Python has no type for."""


@contextmanager
def opened(path: Path) -> Iterator[tuple[pq.ParquetFile, Mapping[str, Any]]]:
    """A Parquet file and the features of `datasets` that it declares; what is wrong with it is an InputError."""
    from datasets import Features

    try:
        with pq.ParquetFile(path) as file:
            try:
                features = Features.from_arrow_schema(file.schema_arrow)
            except (ValueError, TypeError, KeyError, AttributeError) as error:  # whatever stands where they are kept
                raise InputError(path, f"declares its columns as no version of `datasets` does ({error})") from error
            yield file, features
    except (pa.ArrowException, OSError) as error:
        raise InputError(path, f"broken Parquet file ({error})") from error


class ParquetRows:
    """(number, {column: value}) of a file; BadRow for one that cannot be read, behind which it goes on.

    Args:
        columns: limits what is read, where all of them are there.
    """

    def __init__(
        self, path: Path, file: pq.ParquetFile, features: Mapping[str, Any], columns: list[str] | None = None
    ) -> None:
        if columns is not None and all(name in features for name in columns):
            features = {name: features[name] for name in columns}
        self._path, self._file, self._features = path, file, features
        self._groups = iter(range(file.num_row_groups))
        self._batches: Iterator[pa.RecordBatch] = iter(())
        self._batch: Iterator[Any] = iter(())
        self._number = self._end = 0

    def __iter__(self) -> ParquetRows:
        return self

    def __next__(self) -> tuple[int, dict[str, Any]]:
        while (row := next(self._batch, None)) is None:
            self._batch = self._next_batch()
        self._number += 1
        if isinstance(row, pa.RecordBatch):
            try:
                (row,) = row.to_pylist()
            except _DAMAGE as error:
                where = f"{self._path}, row {self._number}"
                raise BadRow(where, f"cannot be read ({error})", "broken Parquet") from error
        return self._number, with_names(row, self._features)

    def _next_batch(self) -> Iterator[Any]:
        """The next rows; as batches of one where not all of them can be read."""
        try:
            while (batch := next(self._batches, None)) is None:
                group = next(self._groups)
                self._number, self._end = self._end, self._end + self._file.metadata.row_group(group).num_rows
                self._batches = self._file.iter_batches(_BATCH, row_groups=[group], columns=list(self._features))
        except _DAMAGE as error:
            self._batches = iter(())
            lost, where = self._end - self._number, f"{self._path}, row {self._number + 1}"
            raise BadRow(where, f"broken Parquet file ({error})", "broken Parquet", lost) from error
        try:
            return iter(batch.to_pylist())
        except _DAMAGE:
            return (batch.slice(place, 1) for place in range(len(batch)))


def with_names(row: dict[str, Any], features: Mapping[str, Any]) -> dict[str, Any]:
    """A row of a data set of `datasets` with names in place of ClassLabel indices, also inside of lists."""
    return {column: _named(value, features[column]) for column, value in row.items()}


def label_names(feature: Any) -> tuple[str, ...] | None:
    """The names that a feature of `datasets` declares for classes, in order, also inside of lists; None: no names."""
    names, inner = getattr(feature, "names", None), getattr(feature, "feature", None)
    if names is not None:
        return tuple(names)
    return None if inner is None else label_names(inner)


def _named(value: Any, feature: Any) -> Any:
    names, inner = getattr(feature, "names", None), getattr(feature, "feature", None)
    if names is not None:  # a missing label is None, or -1 as `datasets` also writes it
        if value is None or value < 0:
            return None
        return names[value] if value < len(names) else value  # a class without a name is no label of any task
    return [_named(each, inner) for each in value] if isinstance(value, list) and inner is not None else value
