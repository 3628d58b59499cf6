"""A stand-in for `srun`: one task on each node of the job, over ssh, with this environment; the highest status.

With `--kill-on-bad-exit=1` the first task that fails ends the others, and its status is the job's.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time

if __name__ == "__main__":
    command = sys.argv[1:]
    options = []
    while command[0].startswith("--"):
        options.append(command.pop(0))
    tasks = []
    for number, node in enumerate(os.environ["SLURM_JOB_NODELIST"].split(",")):
        carried = {**os.environ, "SLURM_NODEID": str(number)}
        variables = shlex.join(f"{name}={value}" for name, value in carried.items() if name.isidentifier())
        line = f"cd {shlex.quote(os.getcwd())} && exec env -i {variables} {shlex.join(command)}"
        tasks.append(subprocess.Popen(["ssh", node, line], stdin=subprocess.DEVNULL))
    bad = 0
    while any(task.poll() is None for task in tasks):
        if "--kill-on-bad-exit=1" in options:
            bad = bad or next((task.returncode for task in tasks if task.returncode), 0)
            for task in tasks if bad else ():
                task.terminate()
        time.sleep(0.1)
    sys.exit(bad or max(task.returncode for task in tasks))
