"""Slurm's templates in so far as they need no cluster (jobs on nodes: test_hosts.py)."""

from __future__ import annotations

import re
import subprocess

import pytest
from processes import ROOT


@pytest.mark.parametrize("template", ["slurm.sbatch", "slurm_evaluate.sbatch"])
def test_jobs_that_follow_each_other_have_ports_of_their_own(template):
    (line,) = re.findall(r"^export MASTER_PORT=.*", (ROOT / "launch" / template).read_text(), re.MULTILINE)
    script = f"for SLURM_JOB_ID in 9998 9999 10000 10001 19999; do {line.partition('#')[0]}; echo $MASTER_PORT; done"
    done = subprocess.run(["bash", "-euc", script], capture_output=True, text=True, check=True)
    ports = [int(port) for port in done.stdout.split()]
    taken = [port + more for port in ports[:4] for more in (0, 1)]  # torch's store, and where guardians meet
    assert len(set(taken)) == 8 and ports[4] == ports[1]  # every 10,000th has the same
    assert all(1024 < port < 65535 for port in taken)
