"""Deltas on disk: differences of tuned weights from their base, stored exactly or compressed, read by range.

A file holds for each tensor of the base one of
- `name`: the difference (fp32, bf16 or fp16), and with the exact codec the elements at which base + difference,
  rounded, is not the tuned value: `name::index` (flat) and `name::value`,
- `name::left` [m, r] and `name::right` [r, n]: a difference of low rank,
- `name::signs` and `name::scales`, `name::shape`: one bit per element (`weights.algebra.one_bit`),
- `name::same`: nothing but the shape of a tensor that tuning left as it was.
The header's metadata name the codec and the dtypes of the tuned tensors.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from recyclable.errors import InputError
from recyclable.weights.algebra import add, flat_range, from_one_bit, low_rank, one_bit, subtract
from recyclable.weights.checkpoint_files import DTYPES, Ranged, SafetensorsFile
from recyclable.weights.differences import Differences
from recyclable.weights.digest import Digested, element_pieces, in_threads
from recyclable.weights.files import Layout, SafetensorsWriter, write_in_pieces
from recyclable.weights.strict_json import parse_json
from recyclable.weights.team import ALONE, Team

CODECS = ("exact", "bf16", "lowrank", "1bit")
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_INDEX, _VALUE, _LEFT, _RIGHT = "::index", "::value", "::left", "::right"
_SIGNS, _SCALES, _SHAPE, _SAME = "::signs", "::scales", "::shape", "::same"
_PARTS = {_INDEX, _VALUE, _LEFT, _RIGHT, _SIGNS, _SCALES, _SHAPE, _SAME}


@dataclass(frozen=True)
class Codec:
    """How differences are stored."""

    name: str = "exact"
    """exact: the tuned weights come back bit for bit; bf16; lowrank and 1bit for matrices (the rest in bf16)."""
    rank: int = 16

    def __post_init__(self) -> None:
        if self.name not in CODECS:
            raise InputError("codec", f"found {self.name!r}, expected one of {', '.join(CODECS)}")

    @classmethod
    def asked(cls, name: str | None, rank: int | None, where: str = "rank") -> Codec | None:
        """The codec that somebody names, None for no name; InputError for a rank below 1 or of another than lowrank.

        Args:
            where: how the rank is called there, for messages.
        """
        if rank is not None and (name != "lowrank" or rank < 1):
            raise InputError(where, f"found {rank} with codec {name}, expected 1 or more and lowrank")
        return None if name is None else cls(name, cls.rank if rank is None else rank)


class Delta:
    """The differences in a file, by tensor of the base.

    Raises InputError when the parts do not hold together.
    """

    def __init__(self, file: Digested[SafetensorsFile]) -> None:
        self.file, source = file, file.source
        self._parts: dict[str, set[str]] = {}
        for stored in file.names:
            name, separator, part = stored.partition("::")
            if separator + part not in _PARTS | {""}:
                raise InputError(source.path, f"holds {stored!r}, which is no part of a delta")
            self._parts.setdefault(name, set()).add(separator + part)
        allowed = ({""}, {"", _INDEX, _VALUE}, {_LEFT, _RIGHT}, {_SIGNS, _SCALES, _SHAPE}, {_SAME})
        for name, parts in self._parts.items():
            if parts not in allowed:
                raise InputError(source.path, f"{name} has parts {sorted(parts)}, which do not make a difference")
        self.codec = source.metadata.get("codec", "fp32")
        try:
            dtypes = parse_json(source.metadata.get("tuned_dtypes", "{}"), f"{source.path}, tuned_dtypes")
            self._dtypes = {name: DTYPES[dtype] for name, dtype in dtypes.items()}
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise InputError(source.path, f"broken tuned_dtypes in its header: {error}") from error
        self._shapes = {name: self._shape(name) for name in self._parts}
        self._whole = lru_cache(maxsize=8)(lambda stored: self.file[stored])

    def _shape(self, name: str) -> tuple[int, ...]:
        parts, shape = self._parts[name], self.file.shape
        path = self.file.source.path
        if "" in parts:
            if _INDEX in parts and (len(shape(name + _INDEX)) != 1 or shape(name + _INDEX) != shape(name + _VALUE)):
                raise InputError(path, f"{name} has {shape(name + _INDEX)} places for {shape(name + _VALUE)} values")
            if self.file.stored(name).dtype not in _FLOATS:
                raise InputError(path, f"{name} is {self.file.stored(name).dtype}, expected floating point")
            return shape(name)
        if _LEFT in parts:
            left, right = shape(name + _LEFT), shape(name + _RIGHT)
            if len(left) != 2 or len(right) != 2 or left[1] != right[0]:
                raise InputError(path, f"{name} has factors {left} and {right}, which do not make a matrix")
            return (left[0], right[1])
        if _SAME in parts:
            if (stored := self.file.stored(name + _SAME)).dtype != torch.int64 or len(stored.shape) != 1:
                raise InputError(path, f"{name} has the shape {stored.shape} {stored.dtype}, expected a few integers")
            if min(found := tuple(self.file[name + _SAME].tolist()), default=0) < 0:
                raise InputError(path, f"{name} has the shape {found}, expected no negative number")
            return found
        if shape(name + _SHAPE) != (2,):
            raise InputError(path, f"{name} has a shape of {shape(name + _SHAPE)} numbers, expected 2")
        rows, columns = (int(n) for n in self.file[name + _SHAPE])
        found = (shape(name + _SIGNS), shape(name + _SCALES))
        if rows < 0 or columns < 0 or found != ((rows, -(-columns // 8)), (rows,)):
            raise InputError(path, f"{name} has signs and scales {found}, which do not make [{rows}, {columns}]")
        return (rows, columns)

    @property
    def names(self) -> list[str]:
        """Names of the base's tensors, sorted."""
        return sorted(self._parts)

    @property
    def untouched(self) -> frozenset[str]:
        """Those that tuning left as they were."""
        return frozenset(name for name, parts in self._parts.items() if _SAME in parts)

    def __contains__(self, name: str) -> bool:
        return name in self._parts

    def shape(self, name: str) -> tuple[int, ...]:
        """The difference's shape."""
        return self._shapes[name]

    def tuned_dtype(self, name: str) -> torch.dtype:
        """The dtype of the tuned tensor."""
        return self._dtypes.get(name, torch.float32)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Elements [start, stop) of the flattened difference, fp32."""
        parts, shape = self._parts[name], self._shapes[name]
        if "" in parts:
            return self.file.read(name, start, stop).float()
        stop = torch.Size(shape).numel() if stop is None else stop
        if stop <= start:
            return torch.empty(0)
        if _SAME in parts:
            return torch.zeros(stop - start)

        def part_of(part: str, first: int, last: int) -> torch.Tensor:
            stored = self.file.stored(name + part)
            width = torch.Size(stored.shape[1:]).numel()
            return self.file.read(name + part, first * width, last * width).view(last - first, *stored.shape[1:])

        def rows(first: int, last: int) -> torch.Tensor:
            if _LEFT in parts:
                return part_of(_LEFT, first, last).float() @ self._whole(name + _RIGHT).float()
            return from_one_bit(part_of(_SIGNS, first, last), part_of(_SCALES, first, last), shape[1])

        return flat_range(rows, shape[1], start, stop)

    def __getitem__(self, name: str) -> torch.Tensor:
        """One whole difference, fp32."""
        return self.read(name).view(self._shapes[name])

    def items(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, fp32 difference) one after the other, by name."""
        return ((name, self[name]) for name in self.names)

    def restore(self, name: str, base: torch.Tensor, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Elements [start, stop) of the tuned tensor in its dtype, from those of the very base it was tuned on.

        Bit for bit the tuned weights if the codec is exact.
        """
        if _SAME in self._parts[name]:
            return base.to(self.tuned_dtype(name))
        tuned = add(base, self.read(name, start, stop), dtype=self.tuned_dtype(name))
        if _INDEX in self._parts[name]:
            index = self._whole(name + _INDEX)
            ascending = not len(index) or (index[0] >= 0 and index[-1] < torch.Size(self._shapes[name]).numel())
            if not ascending or (index.diff() <= 0).any():
                raise InputError(self.file.source.path, f"{name}{_INDEX} does not rise within the tensor")
            begin, end = torch.searchsorted(index, torch.tensor([start, start + tuned.numel()], dtype=index.dtype))
            tuned[index[begin:end].long() - start] = self._whole(name + _VALUE)[begin:end]
        return tuned


def write_delta(
    path: Path,
    tuned: Ranged,
    base: Ranged,
    codec: Codec,
    team: Team = ALONE,
    untouched: Collection[str] = (),
) -> None:
    """Store the differences of `tuned` from `base`, whose tensors bear the same names and shapes; a collective.

    The team shares the work out: exact and bf16 in pieces of a few MiB, lowrank and 1bit tensor by tensor.

    Args:
        untouched: tensors of the base that are as they were; `tuned` need not have them.
    """
    names, same = sorted(set(tuned.names).difference(untouched)), _shapes(base, untouched)
    dtypes = {name: tuned.stored(name).dtype for name in names}
    metadata = {
        "codec": codec.name,
        "tuned_dtypes": json.dumps({name: _NAMES[dtype] for name, dtype in dtypes.items()}),
    }
    if codec.name == "exact":
        _write_exact(path, tuned, base, names, same, metadata, team)
    elif codec.name == "bf16":
        layout = {name: (torch.bfloat16, tuned.shape(name)) for name in names}
        reads = _or_shape(same, lambda *piece: _difference(tuned, base, *piece).bfloat16())
        write_in_pieces(path, layout | _layout(same), reads, metadata, team)
    else:
        layouts = {name: _parts(name, tuned.shape(name), codec) for name in names}
        layout = {part: form for parts in layouts.values() for part, form in parts.items()}
        writer = SafetensorsWriter(path, layout | _layout(same), metadata, team)
        _write_shapes(writer, same, team)
        for name in names[team.rank :: team.size]:
            values = _compress(_difference(tuned, base, name).view(tuned.shape(name)), codec, len(layouts[name]))
            for (part, (dtype, _)), tensor in zip(layouts[name].items(), values, strict=True):
                writer.write(part, tensor.to(dtype))
        writer.close()


def write_differences(
    path: Path, differences: Differences, team: Team = ALONE, untouched: Collection[str] = ()
) -> None:
    """Store differences in fp32 as they are; a collective.

    Args:
        untouched: tensors whose differences are nothing.
    """
    same = _shapes(differences, untouched)
    layout = {name: (torch.float32, differences.shape(name)) for name in differences.names if name + _SAME not in same}
    write_in_pieces(path, layout | _layout(same), _or_shape(same, differences.read), {"codec": "fp32"}, team)


def _shapes(of: Ranged | Differences, names: Collection[str]) -> dict[str, torch.Tensor]:
    """What is stored of untouched tensors."""
    return {name + _SAME: torch.tensor(of.shape(name), dtype=torch.int64) for name in sorted(names)}


def _layout(same: Mapping[str, torch.Tensor]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    return {part: (shape.dtype, tuple(shape.shape)) for part, shape in same.items()}


def _or_shape(same: Mapping[str, torch.Tensor], read: Callable[[str, int, int], torch.Tensor]) -> Any:
    """Reads as given, and the shapes of untouched tensors."""
    return lambda name, start, stop: same[name][start:stop] if name in same else read(name, start, stop)


def _write_shapes(writer: SafetensorsWriter, same: Mapping[str, torch.Tensor], team: Team) -> None:
    for part, shape in same.items() if team.rank == 0 else ():
        writer.write(part, shape)


def _difference(tuned: Ranged, base: Ranged, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
    return subtract(tuned.read(name, start, stop), base.read(name, start, stop))


def _parts(name: str, shape: tuple[int, ...], codec: Codec) -> Layout:
    """What lowrank and 1bit store of a difference."""
    if len(shape) == 2 and codec.name == "1bit":
        rows, columns = shape
        signs, scales = (torch.uint8, (rows, -(-columns // 8))), (torch.float32, (rows,))
        return {name + _SIGNS: signs, name + _SCALES: scales, name + _SHAPE: (torch.int64, (2,))}
    if len(shape) == 2 and codec.rank * sum(shape) < math.prod(shape):
        left, right = (shape[0], codec.rank), (codec.rank, shape[1])
        return {name + _LEFT: (torch.bfloat16, left), name + _RIGHT: (torch.bfloat16, right)}
    return {name: (torch.bfloat16, shape)}


def _compress(difference: torch.Tensor, codec: Codec, parts: int) -> tuple[torch.Tensor, ...]:
    """The values of a difference's parts, in the order of `_parts`."""
    if parts == 1:
        return (difference,)
    if codec.name == "lowrank":
        return low_rank(difference, codec.rank)
    return (*one_bit(difference), torch.tensor(difference.shape))


def _write_exact(
    path: Path,
    tuned: Ranged,
    base: Ranged,
    names: list[str],
    same: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str],
    team: Team,
) -> None:
    """Differences in the tuned dtype, or in fp32 where that is smaller, with the elements that do not come back.

    Two numbers within a factor of two of each other have a difference that their own format holds exactly (Sterbenz
    1974), so what tuning moved little needs no fp32 difference and hardly any corrections.
    """
    tasks = element_pieces({name: tuned.shape(name) for name in names})

    def wrong(task: tuple[str, int, int], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The stored difference, the piece's elements at which it gives something else, and what it should give."""
        want, from_base = tuned.read(*task), base.read(*task)
        difference = subtract(want, from_base).to(dtype)
        got = add(from_base, difference, dtype=want.dtype)
        bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[want.dtype.itemsize]
        places = (got.view(bits) != want.view(bits)).nonzero().view(-1)
        return difference, places, want[places]

    def count(task: tuple[str, int, int]) -> dict[torch.dtype, float]:
        """Corrections by dtype of the difference; a dtype in which one would overflow is out of the question."""
        counts: dict[torch.dtype, float] = {}
        for dtype in {_own_dtype(tuned, task[0]), torch.float32}:
            difference, places, _ = wrong(task, dtype)
            overflows = dtype == torch.float16 and difference.isinf().any()
            counts[dtype] = math.inf if overflows else len(places)
        return counts

    layout = _layout(same)
    begins: dict[tuple[str, int, int], int] = {}
    counted = zip(tasks, in_threads(count, tasks, team=team), strict=True)
    pieces_of = {name: list(pieces) for name, pieces in groupby(counted, key=lambda piece: piece[0][0])}
    for name in names:
        stored, pieces = tuned.stored(name), pieces_of.get(name, [])
        index = torch.int32 if stored.numel < 2**31 else torch.int64
        each = index.itemsize + stored.dtype.itemsize
        sizes = {
            dtype: stored.numel * dtype.itemsize + each * sum(counts[dtype] for _, counts in pieces)
            for dtype in (_own_dtype(tuned, name), torch.float32)
        }
        dtype = min(sizes, key=sizes.__getitem__)
        layout[name] = (dtype, stored.shape)
        corrected = 0
        for task, counts in pieces:
            begins[task] = corrected
            corrected += int(counts[dtype])  # finite: fp32 never overflows
        if corrected:
            layout[name + _INDEX] = (index, (corrected,))
            layout[name + _VALUE] = (stored.dtype, (corrected,))
    writer = SafetensorsWriter(path, layout, metadata, team)
    _write_shapes(writer, same, team)

    def write(task: tuple[str, int, int]) -> None:
        name, start, _ = task
        difference, places, values = wrong(task, layout[name][0])
        writer.write(name, difference, start)
        if len(places):
            writer.write(name + _INDEX, (places + start).to(layout[name + _INDEX][0]), begins[task])
            writer.write(name + _VALUE, values, begins[task])

    in_threads(write, tasks, team=team)
    writer.close()


def _own_dtype(tuned: Ranged, name: str) -> torch.dtype:
    dtype = tuned.stored(name).dtype
    return dtype if dtype in (torch.bfloat16, torch.float16) else torch.float32
