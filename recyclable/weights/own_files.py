"""Links out of a model's directory are not followed: whoever made it would decide which of your files are read."""

from __future__ import annotations

from pathlib import Path

from recyclable.errors import InputError
from recyclable.weights.chat_template import FOLDER


def require_own_files(folder: Path) -> None:
    """InputError where a file of a directory of a base or of adapted weights is a link out of it.

    The directory itself may be one; and in the hub's cache files are links to the same model's blobs.
    """
    home = folder.resolve()
    own = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
    try:
        links = [path for path in (*folder.iterdir(), *(folder / FOLDER).glob("*")) if path.is_symlink()]
    except OSError as error:
        raise InputError(folder, f"cannot be read ({error.strerror})") from error
    for link in links:
        try:
            target = link.resolve()
            outside = (target.is_file() or link.name == FOLDER) and not any(map(target.is_relative_to, own))
        except (OSError, RuntimeError) as error:  # RuntimeError: of links in a circle
            raise InputError(link, f"is a link that leads nowhere ({error})") from error
        if outside:
            problem = "is a link out of the model's directory, which is not followed: expected the file itself there"
            raise InputError(link, problem)
