"""What files of a model's directory may be: links out of it are not followed, and texts are no larger than any.

Whoever made the directory would else decide which of your files are read, and how much memory that takes.
"""

from __future__ import annotations

from pathlib import Path

from recyclable.errors import InputError
from recyclable.weights.chat_template import FOLDER

_READ = ("tokenizer", "vocab", "merges", "special_tokens_map", "added_tokens", "chat_template", "generation_config")
_TEXTS = (".model", ".jinja")
_MAX_BYTES = 1 << 28
"""Eight times the largest tokenizer's."""


def require_own_files(folder: Path) -> None:
    """InputError where a file of a directory of a base or of adapted weights is a link out of it, or a vast text.

    The directory itself may be one; and in the hub's cache files are links to the same model's blobs.
    """
    home = folder.resolve()
    own = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
    try:
        files = (*folder.iterdir(), *(folder / FOLDER).glob("*"))
        links = [path for path in files if path.is_symlink()]
    except OSError as error:
        raise InputError(folder, f"cannot be read ({error.strerror})") from error
    for link in links:
        try:
            target = link.resolve()
            read = link.name == FOLDER or (target.exists() and not target.is_dir())
        except (OSError, RuntimeError) as error:  # RuntimeError: of links in a circle
            raise InputError(link, f"is a link that leads nowhere ({error})") from error
        if read and not any(map(target.is_relative_to, own)):
            problem = "is a link out of the model's directory, which is not followed: expected the file itself there"
            raise InputError(link, problem)
    for file in files:
        read = file.name.startswith(_READ) or file.suffix in _TEXTS
        if read and file.is_file() and (size := file.stat().st_size) > _MAX_BYTES:
            raise InputError(file, f"has {size} bytes, expected {_MAX_BYTES} at most")
