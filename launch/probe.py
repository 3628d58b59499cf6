"""One rank of a probe, as the deepspeed launcher starts it: `deepspeed launch/probe.py --weights W --base B ...`."""

import sys

from recyclable.probe_cli import rank_main

if __name__ == "__main__":
    sys.exit(rank_main(sys.argv[1:]))
