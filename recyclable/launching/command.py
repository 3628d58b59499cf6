"""The command line of deepspeed's launcher, and its environment."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path

from recyclable.errors import InputError
from recyclable.host import free_port, on_cpu
from recyclable.launching.hostfile import hosts_of


def launcher_command(
    script: str, args: list[str], nproc: int | None, hostfile: str | Path | None, port: int | None
) -> list[str]:
    """The command line that starts a script on every rank; InputError for an unusable hostfile or number of ranks."""
    if nproc is not None and nproc < 1:
        raise InputError("--nproc", f"is {nproc}, expected at least 1 rank per host")
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--no_local_rank"]
    # "critical": at "error" deepspeed repeats the whole command line when a rank ends with a status
    command += ["--log_level", "info" if _verbose() else "critical"]
    if hostfile is None:
        command += ["--hostfile", os.devnull, "--num_gpus", str(nproc or 1)]  # else deepspeed looks for /job/hostfile
        command += ["--master_port", str(port or free_port())]
        return [*command, script, *args]
    if len(hosts_of(Path(hostfile))) > 1:
        if shutil.which("pdsh") is None:
            raise InputError(hostfile, "names several hosts, but pdsh, which reaches them over ssh, is not installed")
        # deepspeed itself quotes what holds a space; everything else goes through the remote shell as it is
        args = [arg if " " in arg else shlex.quote(arg) for arg in args]
    command += ["--hostfile", str(hostfile)]
    command += ["--num_gpus", str(nproc)] if nproc else []
    command += ["--master_port", str(port)] if port else []
    return [*command, script, *args]


def launcher_environment(nproc: int | None, local: bool) -> dict[str, str]:
    """Its environment."""
    environment = dict(os.environ)
    if on_cpu():
        environment["DS_ACCELERATOR"] = "cpu"
    if local:
        # More threads than cores make ranks several times slower. (With a hostfile each rank sees to it itself.)
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // (nproc or 1))))
        environment["RECYCLABLE_LEASH"] = "1"
    return environment


def _verbose() -> bool:
    return bool(os.environ.get("RECYCLABLE_VERBOSE"))
