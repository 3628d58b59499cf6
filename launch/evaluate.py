"""One rank of `recyclable evaluate`, as the deepspeed launcher starts it: `deepspeed launch/evaluate.py ...`."""

import sys

from recyclable.commands.parts.ranks import rank_main

if __name__ == "__main__":
    sys.exit(rank_main("evaluate"))
