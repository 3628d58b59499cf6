"""One rank of `recyclable tune`, as the deepspeed launcher starts it: `deepspeed launch/tune.py run.yaml ...`."""

import sys

from recyclable.commands.parts.ranks import rank_main

if __name__ == "__main__":
    sys.exit(rank_main("tune"))
