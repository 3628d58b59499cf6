"""One rank of `recyclable stack`, as the deepspeed launcher starts it: `deepspeed launch/stack.py run.yaml ...`."""

import sys

from recyclable.commands.parts.ranks import rank_main

if __name__ == "__main__":
    sys.exit(rank_main("stack"))
