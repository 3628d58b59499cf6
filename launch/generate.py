"""One rank of `recyclable generate`, as the deepspeed launcher starts it: `deepspeed launch/generate.py ...`."""

import sys

from recyclable.commands.parts.ranks import rank_main

if __name__ == "__main__":
    sys.exit(rank_main("generate"))
