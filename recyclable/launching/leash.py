"""Ends a rank with the command that started it."""

from __future__ import annotations

import os
import threading


def end_with_command() -> None:
    """On a rank: end once the command that launched it is gone, however it died.

    Its stdin is then a pipe held open by that command alone, so it is at its end when the command is.
    """
    if os.environ.pop("RECYCLABLE_LEASH", None):
        threading.Thread(target=lambda: os.read(0, 1) or os._exit(1), daemon=True).start()
