"""What this host offers: an accelerator or not, ports, addresses. Does without importing torch, which takes seconds."""

from __future__ import annotations

import importlib.util
import os
import re
import socket
import sys
from pathlib import Path

_DEVICE_FILES = ("/dev/nvidiactl", "/dev/nvidia0", "/dev/kfd", "/dev/dxg", "/dev/dri")  # NVIDIA, AMD, WSL, Intel
_LOOPBACK = ("127.", "127.0.0.1", "::1", "localhost")
_ANYWHERE = "192.0.2.1"  # in no network: by where a host would send it, its default route is known


def on_cpu() -> bool:
    """True when DeepSpeed would find no accelerator here; in doubt False, and DeepSpeed looks for itself."""
    if "DS_ACCELERATOR" in os.environ:
        return os.environ["DS_ACCELERATOR"] == "cpu"
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return True
    if not _built_for_accelerator():
        return True
    return sys.platform == "linux" and not any(Path(file).exists() for file in _DEVICE_FILES)


def use_cpu_if_alone() -> None:
    """Set DS_ACCELERATOR=cpu where there is no accelerator; only counts before deepspeed is imported."""
    if on_cpu():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def free_port() -> int:
    """A TCP port of this host that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def is_here(name: str) -> bool:
    """Whether a host's name or address is this host's."""
    own = socket.gethostname()
    if name in (*_LOOPBACK, own, own.split(".")[0]):
        return True
    try:
        found = {str(info[4][0]) for info in socket.getaddrinfo(name, None)}
    except OSError:
        return False
    return any(address in found for addresses in addresses().values() for address in addresses)


def addresses() -> dict[str, list[str]]:
    """Network interface -> its addresses, of those that have any."""
    import psutil  # here: most commands need none

    families = (socket.AF_INET, socket.AF_INET6)
    found = {
        name: [each.address.partition("%")[0] for each in addresses if each.family in families]
        for name, addresses in psutil.net_if_addrs().items()
    }
    return {name: own for name, own in found.items() if own}


def address_towards(other: str) -> str | None:
    """The address that this host shows another, None where there is no way to it."""
    try:
        family, kind, _, _, place = socket.getaddrinfo(other, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as link:
            link.connect(place)  # of datagrams: nothing is sent
            return str(link.getsockname()[0])
    except OSError:
        return None


def interface_towards(other: str) -> str | None:
    """The network interface by which this host and another, or hosts and this one, reach each other.

    None for this host's loopback address. A name of this host's that stands for it, as on Debian, is another matter:
    then the interface is the one that leads anywhere.
    """
    if other in _LOOPBACK:
        return None
    own = address_towards(other)
    if own is not None and own.startswith(_LOOPBACK):
        own = address_towards(_ANYWHERE)
    return next((name for name, found in addresses().items() if own in found), None)


def _built_for_accelerator() -> bool:
    """Whether the installed torch was built for CUDA, ROCm or XPU, read from its version file."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return False
    version = Path(spec.origin).with_name("version.py")
    return bool(re.search(r"^(cuda|hip|xpu)\b[^=\n]*= *['\"]", version.read_text(encoding="utf-8"), re.MULTILINE))
