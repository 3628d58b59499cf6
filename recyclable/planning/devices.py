"""What devices there are and what they can do: accelerators by their data sheets, this machine by what it does now."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch

from recyclable.errors import InputError

_UNITS = {"": 1, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
_CGROUP = Path("/sys/fs/cgroup")
_MEASURED_S = 0.3
"""What each of two measurements of this machine may take."""


@dataclass(frozen=True)
class Device:
    """One accelerator, or one rank's part of a CPU. Rates are those of data sheets, which nothing reaches.

    Bandwidths are in bytes per second, each way where there are two.
    """

    name: str
    memory: float
    """Bytes."""
    flops: float
    """Dense FLOP/s: of an accelerator in bf16, of a CPU in fp32."""
    bandwidth: float
    """Of its memory."""
    link: float
    """To another device of the host: NVLink or the like, else PCIe."""
    host_link: float
    """To the host's memory: PCIe."""
    network: float
    """Its share of the host's network."""
    on_cpu: bool = False


def _sheet(name: str, gigabytes: float, tera: float, bandwidth: float, link: float, pcie: float, net: float) -> Device:
    return Device(name, gigabytes * 1e9, tera * 1e12, bandwidth * 1e9, link * 1e9, pcie * 1e9, net * 1e9)


_KNOWN = {
    # a part of torch's name for it; GB, TFLOP/s dense bf16, GB/s: memory, link, PCIe, network share of usual hosts
    "B200": _sheet("b200", 180, 2250, 7700, 900, 64, 50),
    "H200": _sheet("h200", 141, 989, 4800, 450, 64, 50),
    "H100 PCIe": _sheet("h100-pcie", 80, 756, 2000, 64, 64, 12.5),
    "H100": _sheet("h100", 80, 989, 3350, 450, 64, 50),
    "A100-SXM4-40GB": _sheet("a100-40gb", 40, 312, 1555, 300, 32, 12.5),
    "A100-PCIE-40GB": _sheet("a100-40gb-pcie", 40, 312, 1555, 32, 32, 12.5),
    "A100 80GB PCIe": _sheet("a100-80gb-pcie", 80, 312, 1935, 32, 32, 12.5),
    "A100": _sheet("a100-80gb", 80, 312, 2039, 300, 32, 25),
    "MI300X": _sheet("mi300x", 192, 1307, 5300, 448, 64, 50),
    "L40S": _sheet("l40s", 48, 362, 864, 32, 32, 12.5),
    "RTX A6000": _sheet("a6000", 48, 155, 768, 32, 32, 3),
    "RTX 4090": _sheet("rtx4090", 24, 165, 1008, 32, 32, 3),
    "L40": _sheet("l40", 48, 181, 864, 32, 32, 12.5),
    "L4": _sheet("l4", 24, 121, 300, 32, 32, 3),
    "A10": _sheet("a10", 24, 125, 600, 32, 32, 3),
}
"""Vendors' data sheets (NVIDIA, AMD; NVLink's figures halved, as they count both ways). Networks are no part of them:
400, 200, 100 and 25 Gbit/s a device, as hosts of these kinds mostly have."""
_GLOO = 1.0e9
"""What ranks on one host reach through gloo, in bytes per second: about what it does on loopback."""


def by_name(name: str) -> Device:
    """A device by the name that `plan` takes; InputError names those there are."""
    known = {device.name: device for device in _KNOWN.values()}
    if name not in known:
        raise InputError("--device", f"is {name!r}, expected cpu or one of {', '.join(sorted(known))}")
    return known[name]


def by_torch_name(name: str) -> Device | None:
    """A device by what torch calls it; None for one that is not known."""
    return next((device for part, device in _KNOWN.items() if re.search(rf"\b{part}\b", name)), None)


def peak_flops() -> float | None:
    """Dense bf16 FLOP/s of this rank's device, None for a CPU or an unknown accelerator."""
    if not torch.cuda.is_available():
        return None
    known = by_torch_name(torch.cuda.get_device_name())
    return None if known is None else known.flops


def this_gpu() -> Device:
    """This process's GPU with the memory that is free on it; one that no data sheet here tells of is measured."""
    name, free = torch.cuda.get_device_name(), torch.cuda.mem_get_info()[0]
    if (known := by_torch_name(name)) is not None:
        return replace(known, memory=free)
    flops = _product_rate("cuda", torch.bfloat16, 4096)
    return Device(name, free, flops, _copy_rate("cuda"), 16e9, 16e9, 3e9)


def this_cpu(ranks: int) -> Device:
    """One of so many ranks' part of this machine, measured in about a second; its memory is what is free now."""
    before = torch.get_num_threads()
    torch.set_num_threads(_cores())
    try:
        flops, bandwidth = _product_rate("cpu", torch.float32, 1024), _copy_rate("cpu")
    finally:
        torch.set_num_threads(before)
    return Device(
        "cpu", free_memory() / ranks, flops / ranks, bandwidth / ranks, _GLOO / ranks, bandwidth / ranks, 1.25e8, True
    )


def free_memory() -> float:
    """Bytes that processes here may still take: what is free of the machine, and of the control group they are in."""
    free = float(psutil.virtual_memory().available)
    try:
        limit, used = ((_CGROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
        cached = re.search(r"^inactive_file (\d+)$", (_CGROUP / "memory.stat").read_text(), re.MULTILINE)
    except OSError:  # no control group, or one of the first version
        return free
    if limit == "max":
        return free
    return min(free, int(limit) - int(used) + int(cached[1] if cached else 0))


def size(text: str, field: str) -> float:
    """Bytes of what people write: 80GB, 512 MB, 16GiB; InputError names the field."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?\s*", text.upper())
    if found is None or found[2] not in _UNITS or not float(found[1]):
        raise InputError(field, f"is {text!r}, expected a size such as 80GB or 512GiB")
    return float(found[1]) * _UNITS[found[2]]


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _product_rate(device: str, dtype: torch.dtype, width: int) -> float:
    """FLOP/s of products of square matrices."""
    one, other = (torch.randn(width, width, device=device).to(dtype) for _ in range(2))
    return 2.0 * width**3 * _per_second(lambda: one @ other, device)


def _copy_rate(device: str) -> float:
    """Bytes per second, read and written."""
    source = torch.zeros(1 << 24, device=device)
    target = torch.empty_like(source)
    return 2.0 * source.nbytes * _per_second(lambda: target.copy_(source), device)


def _per_second(work: Callable[[], object], device: str) -> float:
    """How often a second something can be done."""

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    work()
    wait()
    times, begin = 0, time.perf_counter()
    while (passed := time.perf_counter() - begin) < _MEASURED_S:
        work()
        wait()
        times += 1
    return times / passed
