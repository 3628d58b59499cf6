"""One rank of continual pre-training, as the deepspeed launcher starts it: `deepspeed launch/pretrain.py run.yaml`."""

import sys

from recyclable.rank import rank_main

if __name__ == "__main__":
    sys.exit(rank_main("pretrain", sys.argv[1:]))
