"""A stand-in for `scontrol`: the nodes of a list of names, and a note in the working directory of what is requeued."""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    if sys.argv[1] == "requeue":
        Path("requeued").write_text(sys.argv[2])
    else:
        assert sys.argv[1:3] == ["show", "hostnames"]
        print("\n".join(sys.argv[3].split(",")))
