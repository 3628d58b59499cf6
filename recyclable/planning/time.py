"""How long an optimizer step takes: arithmetic, what ranks tell each other, the optimizer, what is kept elsewhere.

Volumes of communication: Rajbhandari et al. 2020, ZeRO (arXiv 1910.02054), section 7. The shares of nominal rates that
are reached are assumptions (docs/planning.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from recyclable import machine
from recyclable.planning.devices import Device
from recyclable.planning.states import Sizes

ACCELERATOR_SHARE, CPU_SHARE = 0.4, 0.5
"""Of a device's FLOP/s that training reaches: data sheets' on an accelerator, large products' on a CPU."""
BANDWIDTH_SHARE = 0.7
"""Of every bandwidth but a CPU's, which is measured as it is reached."""
NVME = 2e9
"""Bytes per second of a host's NVMe."""
HOST = 50e9
"""Bytes per second of host memory that the optimizer of one rank reaches."""
_FP32 = 4


@dataclass(frozen=True)
class Seconds:
    """Of one optimizer step."""

    arithmetic: float
    communication: float
    """As far as no arithmetic hides it."""
    optimizer: float
    offload: float
    """To and from where things are kept that do not lie in the device's memory."""

    @property
    def total(self) -> float:
        """All of it."""
        return self.arithmetic + self.communication + self.optimizer + self.offload


@dataclass(frozen=True)
class Fleet:
    """The devices of a run: so many of a kind on so many hosts, a rank each."""

    device: Device
    ranks: int
    hosts: int = 1
    host_memory: float = 0.0
    """Bytes of one host that ranks may take."""

    @property
    def local(self) -> int:
        """Ranks on a host."""
        return -(-self.ranks // self.hosts)

    def share(self, nominal: float) -> float:
        """What is reached of a nominal bandwidth."""
        return nominal if self.device.on_cpu else BANDWIDTH_SHARE * nominal

    @property
    def wire(self) -> float:
        """Bytes per second that a rank sends to others and has from them."""
        device = self.device
        return self.share(min(device.link, device.network) if self.hosts > 1 else device.link)


def seconds(flops: float, micro_batches: int, sizes: Sizes, ds_config: dict[str, Any], fleet: Fleet) -> Seconds:
    """Of one step of a rank.

    Args:
        flops: of all its micro-batches, forward, backward and what is computed again.
        micro_batches: passes through the model with a backward pass each.
    """
    ds_config = machine.as_run(ds_config, fleet.ranks)
    device, zero = fleet.device, ds_config.get("zero_optimization") or {}
    stage, size = machine.zero_stage(ds_config), _FP32 if machine.precision(ds_config) == "float32" else 2
    trained, taught = sum(sizes.trained.values()), sum(sizes.teacher.values())
    student = trained + sum(sizes.frozen.values())
    visits = 3 if machine.recomputes(ds_config) else 2
    own = trained / (fleet.ranks if stage else 1)
    arithmetic = flops / (device.flops * (CPU_SHARE if device.on_cpu else ACCELERATOR_SHARE))

    gathered = micro_batches * (visits * student + taught) if stage == 3 else trained if stage else 0
    reduced = trained * (micro_batches if stage >= 2 else 1) * (1 if stage else 2)
    said = size * (gathered + reduced) * (fleet.ranks - 1) / fleet.ranks / fleet.wire
    hidden = min(said / 2, arithmetic) if zero.get("overlap_comm") else 0.0

    optimizer_on, parameters_on = machine.homes(ds_config)
    on_host = optimizer_on != "none" and not device.on_cpu
    memory = min(HOST, fleet.share(device.bandwidth)) if on_host else fleet.share(device.bandwidth)
    stepped = 7 * _FP32 * own  # weight, two moments and gradient read, all but the gradient written
    to_host, offload = fleet.share(device.host_link), 0.0
    if on_host:
        offload += own * (micro_batches * size + size) / to_host
    if parameters_on != "none":
        read = micro_batches * size * (visits * student + taught) / fleet.ranks
        offload += read / (NVME / fleet.local) if parameters_on == "nvme" else 0.0
        offload += 0.0 if device.on_cpu else read / to_host
    if optimizer_on == "nvme":
        offload += 6 * _FP32 * own / (NVME / fleet.local)  # weight and moments read and written
    return Seconds(arithmetic, said - hidden, stepped / memory, offload)
