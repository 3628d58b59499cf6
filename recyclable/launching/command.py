"""The command line of deepspeed's launcher, and its environment."""

from __future__ import annotations

import functools
import os
import re
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from recyclable.errors import InputError
from recyclable.host import free_port, is_here, on_cpu
from recyclable.launching.exports import exports, for_shells
from recyclable.launching.hostfile import read_hostfile, write_hostfile

LAUNCHERS = {"pdsh": "pdsh", "openmpi": "mpirun"}
"""What reaches other hosts, and the program that it needs."""
_ALIVE = "-oServerAliveInterval=10 -oServerAliveCountMax=3"
"""What ends an ssh whose other side is gone."""


def launcher_command(
    script: str,
    args: list[str],
    nproc: int | None,
    hostfile: str | Path | None,
    port: int | None,
    *,
    launcher: str = "pdsh",
    address: str | None = None,
    extra: Iterable[str] = (),
) -> list[str]:
    """The command line that starts a script on every rank; InputError for an unusable hostfile or number of ranks.

    Args:
        launcher: of `LAUNCHERS`, for a hostfile with other hosts.
        address: of the first host, as the others reach it; None: deepspeed asks the host over ssh.
        extra: names of variables that every rank is given besides, as `launcher_environment`.
    """
    if nproc is not None and nproc < 1:
        raise InputError("--nproc", f"is {nproc}, expected at least 1 rank per host")
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--no_local_rank"]
    # "critical": at "error" deepspeed repeats the whole command line when a rank ends with a status
    command += ["--log_level", "info" if _verbose() else "critical"]
    if hostfile is None:
        command += ["--hostfile", os.devnull, "--num_gpus", str(nproc or 1)]  # else deepspeed looks for /job/hostfile
        command += ["--master_port", str(port or free_port())]
        return [*command, script, *args]
    hosts = {host: nproc or slots for host, slots in read_hostfile(hostfile).items()}
    command += ["--hostfile", str(write_hostfile(_scratch() / "hostfile", hosts))]
    command += ["--master_port", str(port)] if port else []
    command += ["--master_addr", address] if address else []
    if has_others(hosts):
        command += ["--launcher", launcher, "--no_ssh_check"]
        if launcher == "openmpi":
            names = {*exports(os.environ), *extra, "DS_ACCELERATOR"}
            command += ["--launcher_args", " ".join([*_mpi_args(), *(f"-x {name}" for name in sorted(names))])]
        else:
            command += ["--force_multi"]  # one other host alone: else it would be taken for this one
            args = list(map(_through_pdsh, args))
            # Words for deepspeed's second launcher, on each host, to which the first hands this one setting alone as
            # it is: else it tells ten lines about itself there.
            command += [] if _verbose() else ["--enable_each_rank_log", "None --log_level critical"]
    return [*command, script, *args]


def launcher_environment(
    nproc: int | None, local: bool, extra: Mapping[str, str] | None = None, launcher: str = "pdsh"
) -> dict[str, str]:
    """Its environment.

    Args:
        local: whether there is this host alone, without a hostfile.
        extra: what every rank is given besides, on every host.
    """
    environment = {**os.environ, **(extra or {})}
    if on_cpu():
        environment["DS_ACCELERATOR"] = "cpu"
    if local:
        # More threads than cores make ranks several times slower. (With a hostfile each rank sees to it itself.)
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // (nproc or 1))))
        return environment
    carried = {**exports(environment), **(extra or {})}
    file = _scratch() / "environment"
    file.touch(mode=0o600)
    if launcher == "openmpi":  # takes variables by their names (-x); deepspeed's file would give it quotes as well
        file.write_text("")
        environment |= carried
    else:
        file.write_text(for_shells(carried), encoding="utf-8")
        environment["PDSH_SSH_ARGS_APPEND"] = f"{environment.get('PDSH_SSH_ARGS_APPEND', '')} {_ALIVE}".strip()
    environment["DS_ENV_FILE"] = str(file)
    return environment


def has_others(hosts: Mapping[str, int]) -> bool:
    """Whether a run on these hosts has ranks anywhere but here."""
    return len(hosts) > 1 or not all(map(is_here, hosts))


def require_program(launcher: str, hostfile: str | Path) -> None:
    """InputError unless what reaches other hosts is known and installed."""
    if launcher not in LAUNCHERS:
        raise InputError("--launcher", f"is {launcher!r}, expected one of {', '.join(LAUNCHERS)}")
    if shutil.which(LAUNCHERS[launcher]) is None:
        problem = f"names other hosts, but {LAUNCHERS[launcher]}, which starts ranks there, is not installed"
        raise InputError(hostfile, problem)


def _through_pdsh(arg: str) -> str:
    """An argument that comes out as it is behind deepspeed, pdsh (which has a use for %) and the other host's shell.

    deepspeed itself puts double quotes around what holds a space, and a sign before those within.
    """
    arg = re.sub(r"([\\$`])", r"\\\1", arg) if " " in arg else shlex.quote(arg)
    return arg.replace("%", "%%")


def _mpi_args() -> list[str]:
    """deepspeed would tie Open MPI's own connections to an interface called eth0."""
    interface = os.environ.get("GLOO_SOCKET_IFNAME") or os.environ.get("NCCL_SOCKET_IFNAME")
    named = [interface] if interface and not interface.startswith(("^", "=")) else []
    return [f"--mca {key}_tcp_if_include {name}" for name in named for key in ("btl", "oob")] or [
        "--mca btl_tcp_if_include all"
    ]


@functools.cache
def _scratch() -> Path:
    """A directory that is gone when this process ends, for what the launcher reads from files."""
    folder = tempfile.TemporaryDirectory(prefix="recyclable-")
    _kept.append(folder)
    return Path(folder.name)


_kept: list[tempfile.TemporaryDirectory[str]] = []


def _verbose() -> bool:
    return bool(os.environ.get("RECYCLABLE_VERBOSE"))
