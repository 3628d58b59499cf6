"""What one host says of itself: versions, code, devices, memory, disks, interfaces. Does without importing torch."""

from __future__ import annotations

import ctypes.util
import hashlib
import os
import platform
import resource
import shutil
import socket
import subprocess
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import recyclable
from recyclable.host import addresses

PACKAGES = ("torch", "deepspeed", "transformers", "peft", "datasets", "safetensors", "numpy")
"""What ranks compute with, in versions that must be the same on all hosts."""
_NVIDIA_SMI_S = 20


def report(files: Iterable[str] = (), folders: Iterable[str] = ()) -> dict[str, Any]:
    """All of it, as JSON takes it; sizes in bytes.

    Args:
        files: small ones that a run reads, which are told by their SHA-256.
        folders: where a run writes: room in each, or in the nearest directory above that there is.
    """
    threads = os.environ.get("OMP_NUM_THREADS", "")
    return {
        "hostname": socket.gethostname(),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "code": _code(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": int(threads) if threads.isdigit() else None,
        "memory": _memory(),
        "devices": _devices(),
        "shared_memory": _free(Path("/dev/shm")),
        "interfaces": addresses(),
        "chosen_interfaces": {
            name: os.environ[name] for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME") if os.environ.get(name)
        },
        "open_files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        "compiler": shutil.which("cc") is not None,
        "libaio": ctypes.util.find_library("aio") is not None,
        "files": {file: _digest(Path(file)) for file in files},
        "folders": {folder: _folder(Path(folder)) for folder in folders},
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _code() -> str:
    """A digest of recyclable's own source: a checkout has the same version for many states of it."""
    root, digest = Path(recyclable.__file__).parent, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _memory() -> dict[str, int]:
    import psutil

    found = psutil.virtual_memory()
    return {"total": found.total, "available": found.available}


def _devices() -> list[str] | None:
    """Names of the GPUs, as their driver says; None where nothing can be asked."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    query = [program, "--query-gpu=name,memory.total", "--format=csv,noheader"]
    try:
        asked = subprocess.run(query, capture_output=True, text=True, timeout=_NVIDIA_SMI_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return asked.stdout.strip().splitlines()


def _free(folder: Path) -> int | None:
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return None


def _digest(path: Path) -> str | None:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return None


def _folder(folder: Path) -> dict[str, Any]:
    """Room where a directory is or will be made, and whether it can be written to."""
    there = next((path for path in (folder.absolute(), *folder.absolute().parents) if path.exists()), Path("/"))
    return {"free": _free(there), "writable": os.access(there, os.W_OK | os.X_OK) and there.is_dir()}
