"""One rank of a study, as the deepspeed launcher starts it: `deepspeed launch/study.py run.yaml ...`."""

import sys

from recyclable.rank import rank_main

if __name__ == "__main__":
    sys.exit(rank_main("study", sys.argv[1:]))
