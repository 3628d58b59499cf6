"""Opens text that anybody may have written: UTF-8 of a bounded size, or one clear error."""

from __future__ import annotations

from pathlib import Path

from recyclable.errors import InputError


def read_text(path: Path, most: int, expected: str = "") -> str:
    """The text in a file.

    Args:
        most: bytes that it may have.
        expected: what the file should be, for the message where it cannot be read.

    Raises InputError for a file that cannot be read, is larger, or is no UTF-8.
    """
    wanted = f"; expected {expected}" if expected else ""
    try:
        with path.open("rb") as file:
            content = file.read(most + 1)
    except (OSError, ValueError) as error:  # ValueError: of a path with a null byte
        raise InputError(path, f"cannot be read ({getattr(error, 'strerror', error)}){wanted}") from error
    if len(content) > most:
        raise InputError(path, f"has more than {most} bytes{wanted or ', expected less'}")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise InputError(path, f"is not UTF-8 text ({error.reason} at byte {error.start})") from error
