"""One rank of `recyclable study`, as the deepspeed launcher starts it: `deepspeed launch/study.py run.yaml ...`."""

import sys

from recyclable.commands.parts.ranks import rank_main

if __name__ == "__main__":
    sys.exit(rank_main("study"))
