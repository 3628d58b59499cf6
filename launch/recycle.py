"""One rank of recycling, as the deepspeed launcher starts it: `deepspeed launch/recycle.py run.yaml ...`."""

import sys

from recyclable.rank import rank_main

if __name__ == "__main__":
    sys.exit(rank_main("recycle", sys.argv[1:]))
