"""One rank of `recyclable probe`, as the deepspeed launcher starts it: `deepspeed launch/probe.py --weights W ...`."""

import sys

from recyclable.commands.parts.ranks import rank_main

if __name__ == "__main__":
    sys.exit(rank_main("probe"))
