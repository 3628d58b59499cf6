"""One rank of `recyclable pretrain`, as the deepspeed launcher starts it: `deepspeed launch/pretrain.py run.yaml`."""

import sys

from recyclable.commands.parts.ranks import rank_main

if __name__ == "__main__":
    sys.exit(rank_main("pretrain"))
