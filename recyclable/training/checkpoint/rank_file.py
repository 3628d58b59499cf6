"""The file in which a rank keeps its pieces of a checkpoint: `KIND:NAME@START`, flat, in safetensors."""

from __future__ import annotations

import bisect
import json
import re
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from blake3 import blake3

from recyclable.errors import InputError, RunError
from recyclable.training.pieces import MOMENTS, WEIGHT, Piece
from recyclable.weights.checkpoint_files import Ranged, SafetensorsFile, Stored
from recyclable.weights.files import SafetensorsWriter
from recyclable.weights.finite import is_finite
from recyclable.weights.strict_json import parse_json

_KEY = re.compile(rf"({'|'.join((WEIGHT, *MOMENTS))}):(.+)@(0|[1-9][0-9]{{0,18}})", re.DOTALL)


def write_pieces(path: Path, pieces: list[Piece]) -> str:
    """Write pieces, and let go of each as soon as it is written; returns the file's BLAKE3 digest (hex).

    Raises RunError for numbers that are not finite: nobody could go on from them.
    """
    steps = {f"{piece.name}@{piece.start}": piece.steps for piece in pieces}
    waiting = deque(
        (f"{kind}:{piece.name}@{piece.start}", tensor) for piece in pieces for kind, tensor in piece.tensors.items()
    )
    pieces.clear()
    layout = {key: (tensor.dtype, (tensor.numel(),)) for key, tensor in waiting}
    writer = SafetensorsWriter(path, layout, {"steps": json.dumps(steps)})
    digest = blake3(writer.header)
    with ThreadPoolExecutor(1) as hashing:  # while the disk takes the same bytes
        while waiting:
            key, tensor = waiting.popleft()
            if not is_finite(tensor):
                raise RunError(key, "holds NaN or infinity: training has come to nothing")
            hashed = hashing.submit(digest.update, tensor.view(torch.uint8).numpy().data)
            writer.write(key, tensor)
            hashed.result()
    writer.close()
    return digest.hexdigest()


@dataclass(frozen=True, order=True)
class _Place:
    """Where elements [start, stop) of a parameter lie."""

    start: int
    stop: int
    file: int
    key: str


class RankFiles:
    """All ranks' files of a checkpoint, read by kind, name and range (`training.pieces.Kept`).

    Args:
        layout: name -> full shape of every parameter.

    Raises InputError where a file is broken, or all together do not have every element of every parameter once.
    """

    def __init__(self, paths: Iterable[Path], layout: Mapping[str, Sequence[int]]) -> None:
        self._files = [SafetensorsFile(path) for path in paths]
        self._layout, self._steps = layout, dict.fromkeys(layout, 0.0)
        self._places: dict[tuple[str, str], list[_Place]] = {}
        for number, file in enumerate(self._files):
            self._read_header(number, file)
        for name, shape in layout.items():
            for kind in (WEIGHT, *MOMENTS):
                self._require_whole(kind, name, torch.Size(shape).numel())

    def _read_header(self, number: int, file: SafetensorsFile) -> None:
        for key in file.names:
            parts, stored = _KEY.fullmatch(key), file.stored(key)
            if parts is None or parts[2] not in self._layout:
                raise InputError(file.path, f"holds {key!r}, which is no piece of a trained parameter")
            if len(stored.shape) != 1 or not stored.dtype.is_floating_point:
                problem = f"{key!r} is {list(stored.shape)} {stored.dtype}, expected a flat piece of floating point"
                raise InputError(file.path, problem)
            start = int(parts[3])
            place = _Place(start, start + stored.numel, number, key)
            self._places.setdefault((parts[1], parts[2]), []).append(place)
        for key, steps in parse_json(file.metadata.get("steps", ""), file.path, finite=True).items():
            name = key.rpartition("@")[0]
            if name not in self._steps or type(steps) not in (int, float) or steps < 0:
                raise InputError(file.path, f"steps has {steps!r} for {key!r}, expected how many each parameter had")
            self._steps[name] = max(self._steps[name], float(steps))

    def _require_whole(self, kind: str, name: str, numel: int) -> None:
        places = sorted(self._places.get((kind, name), []))
        if not places and kind != WEIGHT:
            return  # the optimizer has not made a step with it
        ends = [0, *(place.stop for place in places)]
        if [place.start for place in places] != ends[:-1] or ends[-1] != numel:
            folder = self._files[0].path.parent if self._files else "the checkpoint"
            raise InputError(folder, f"does not hold each of the {numel} elements of {kind}:{name} once")
        self._places[kind, name] = places

    def steps(self, name: str) -> float:
        """The optimizer's steps with a parameter."""
        return self._steps[name]

    def kind(self, kind: str) -> Ranged:
        """All parameters' pieces of a kind."""
        return _OfKind(self, kind)

    def places(self, kind: str, name: str) -> list[_Place]:
        """Where a parameter's pieces of a kind lie, in their order; empty where there are none."""
        return self._places.get((kind, name), [])

    def shape_of(self, name: str) -> tuple[int, ...]:
        """A parameter's full shape."""
        return tuple(self._layout[name])

    def of_kind(self, kind: str) -> list[str]:
        """The parameters that have pieces of a kind."""
        return sorted(name for found, name in self._places if found == kind)

    def read(self, place: _Place, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop) of the parameter, as far as they lie there."""
        first, last = max(start, place.start) - place.start, min(stop, place.stop) - place.start
        return self._files[place.file].read(place.key, first, last)

    def dtype(self, place: _Place) -> torch.dtype:
        """The dtype that a piece is stored in."""
        return self._files[place.file].stored(place.key).dtype


class _OfKind(Ranged):
    def __init__(self, files: RankFiles, kind: str) -> None:
        self._files, self._kind = files, kind

    @property
    def names(self) -> list[str]:
        return self._files.of_kind(self._kind)

    def __contains__(self, name: str) -> bool:
        return bool(self._files.places(self._kind, name))

    def stored(self, name: str) -> Stored:
        return Stored(self._files.dtype(self._files.places(self._kind, name)[0]), self._files.shape_of(name))

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        places, stored = self._files.places(self._kind, name), self.stored(name)
        stop = stored.numel if stop is None else stop
        result, done = torch.empty(stop - start, dtype=stored.dtype), start
        for place in places[bisect.bisect_right(places, start, key=lambda place: place.start) - 1 :]:
            if done == stop:
                break
            end = min(stop, place.stop)
            result[done - start : end - start] = self._files.read(place, done, end)
            done = end
        return result
