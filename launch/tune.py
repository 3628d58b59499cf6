"""One rank of tuning, as the deepspeed launcher starts it: `deepspeed launch/tune.py run.yaml ...`."""

import sys

from recyclable.rank import rank_main

if __name__ == "__main__":
    sys.exit(rank_main("tune", sys.argv[1:]))
