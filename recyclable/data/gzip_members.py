"""Gzip files of which some members are broken: what the whole ones hold, each checked before any of it is read."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from recyclable.data.bad_rows import BadRow, BadRows

_MAGIC = b"\x1f\x8b\x08"
_PIECE = 1 << 20
_BROKEN_LINE = gzip.compress(b"\xff", mtime=0)
"""No UTF-8, so that no line is put together of what stands before and behind a broken member."""


@dataclass(frozen=True)
class _Member:
    begin: int
    end: int
    whole: bool
    ends_a_line: bool = True


class WholeMembers(io.RawIOBase):
    """The bytes of a gzip file's whole members; broken ones are counted as bad rows.

    Where the whole ones all end with a line's end, so will the broken ones have done; else the two lines that a broken
    one parts are marked as one that is no UTF-8.
    """

    def __init__(self, path: Path, bad: BadRows) -> None:
        self._file = path.open("rb")
        members = list(_members(self._file))
        aligned = all(member.ends_a_line for member in members if member.whole)
        self._parts: list[tuple[int, int] | bytes] = []
        for member in members:
            if member.whole:
                self._parts.append((member.begin, member.end))
            else:
                self._parts += [] if aligned else [_BROKEN_LINE]
                with bad:
                    problem = f"broken gzip up to byte {member.end}"
                    raise BadRow(f"{path}, byte {member.begin}", problem, "broken gzip member")
        self._part = self._place = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """To the beginning, nowhere else."""
        if offset or whence:
            raise io.UnsupportedOperation("only the beginning can be sought")
        self._part = self._place = 0
        return 0

    def readinto(self, buffer: bytearray) -> int:  # type: ignore[override]
        while self._part < len(self._parts):
            part = self._parts[self._part]
            if isinstance(part, bytes):
                piece = part[self._place : self._place + len(buffer)]
            else:
                begin, end = part
                self._file.seek(begin + self._place)
                piece = self._file.read(min(len(buffer), end - begin - self._place))
            if piece:
                buffer[: len(piece)] = piece
                self._place += len(piece)
                return len(piece)
            self._part, self._place = self._part + 1, 0
        return 0

    def close(self) -> None:
        self._file.close()
        super().close()


def _members(file: io.BufferedReader) -> Iterator[_Member]:
    """All members in order; what lies between two whole ones is one broken member."""
    size = file.seek(0, io.SEEK_END)
    place, broken = 0, None
    while place < size:
        member = _read(file, place)
        if member.whole:
            if broken is not None:
                yield _Member(broken, place, whole=False)
            broken = None
            yield member
            place = _behind_padding(file, member.end)
        else:
            broken = place if broken is None else broken
            place = _find_magic(file, place + 1, size)
    if broken is not None:
        yield _Member(broken, size, whole=False)


def _read(file: io.BufferedReader, begin: int) -> _Member:
    """The member that begins there, checked to its end (length and CRC)."""
    file.seek(begin)
    decompressor, last = zlib.decompressobj(wbits=31), b""
    place, pending = begin, b""
    try:
        while not decompressor.eof:
            data = pending or file.read(_PIECE)
            if not data:
                return _Member(begin, place, whole=False)
            out = decompressor.decompress(data, _PIECE)
            last = out[-1:] or last
            pending = decompressor.unconsumed_tail
            place += len(data) - len(pending) - len(decompressor.unused_data)
    except zlib.error:
        return _Member(begin, place, whole=False)
    return _Member(begin, place, whole=True, ends_a_line=last in (b"\n", b""))


def _behind_padding(file: io.BufferedReader, place: int) -> int:
    """Zeros may stand behind a member."""
    file.seek(place)
    while data := file.read(_PIECE):
        rest = data.lstrip(b"\0")
        place += len(data) - len(rest)
        if rest:
            break
    return place


def _find_magic(file: io.BufferedReader, place: int, size: int) -> int:
    """Where the next member may begin, from `place` on; the file's end where none does."""
    overlap = len(_MAGIC) - 1
    while place < size:
        file.seek(place)
        data = file.read(_PIECE)
        if (found := data.find(_MAGIC)) >= 0:
            return place + found
        if len(data) <= overlap:
            break
        place += len(data) - overlap
    return size
