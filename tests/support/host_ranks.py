"""What one rank says of where it runs and what it was given, once it has met the others."""

from __future__ import annotations

import json
import os
import socket
import sys

import torch

from recyclable import distributed
from recyclable.launching import guard
from recyclable.launching.causes import DONE

ASKED = ("TORCH_ODD", "TORCH_ODD_TOO", "OF_THE_FILE", "HF_TOKEN", "OTHER")  # a line over 4 KiB mpirun would break

if __name__ == "__main__":
    distributed.init()
    total = distributed.sum_over_ranks(torch.tensor([distributed.rank() + 1]))
    told = {
        "rank": distributed.rank(),
        "host": socket.gethostname(),
        "sum": int(total),
        "arguments": sys.argv[1:],
        "interface": os.environ.get("GLOO_SOCKET_IFNAME"),
        "variables": {name: os.environ[name] for name in ASKED if name in os.environ},
    }
    print(json.dumps(told), flush=True)
    distributed.barrier()
    distributed.shutdown()
    guard.last_word(DONE)  # as every command's rank: mpirun is often faster than a guardian to see how one ended
