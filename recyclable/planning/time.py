"""How long an optimizer step takes: arithmetic, what ranks tell each other, the optimizer, what is kept elsewhere.

The shares of nominal rates that are reached are assumptions (docs/planning.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from recyclable import machine
from recyclable.planning.communication import said
from recyclable.planning.devices import Device
from recyclable.planning.states import Sizes

ACCELERATOR_SHARE, CPU_SHARE = 0.4, 0.5
"""Of a device's FLOP/s that training reaches: data sheets' on an accelerator, large products' on a CPU."""
BANDWIDTH_SHARE = 0.7
"""Of every bandwidth but a CPU's, which is measured as it is reached."""
OVERLAP = 0.5
"""Of the communication that the arithmetic hides at most, where `overlap_comm` is on."""
START, HOP, NETWORK_HOP = 10e-6, 1.9e-6, 4e-6
"""Seconds until a collective begins, and of each hop of a ring, within a host and between hosts: NCCL's own figures for
rings (src/graph/tuning.cc, protocol LL128)."""
CPU_START = 100e-6
"""Of a collective through gloo, on one host."""
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
    reached: float | None = None
    """Share of the device's FLOP/s that arithmetic reaches; None: as is assumed."""

    @property
    def local(self) -> int:
        """Ranks on a host."""
        return -(-self.ranks // self.hosts)

    def share(self, nominal: float) -> float:
        """What is reached of a nominal bandwidth."""
        return nominal if self.device.on_cpu else BANDWIDTH_SHARE * nominal

    @property
    def wire(self) -> float:
        """Bytes per second that a rank sends to others and has from them: a ring's slowest link.

        Where it leaves a host, it does so by the networks of all the host's devices at once.
        """
        device = self.device
        return self.share(min(device.link, self.local * device.network) if self.hosts > 1 else device.link)

    @property
    def latency(self) -> float:
        """Seconds of one collective beside what it moves."""
        if self.ranks == 1:
            return 0.0
        between = self.hosts - 1
        start = CPU_START if self.device.on_cpu else START
        return start + (self.ranks - 1 - between) * HOP + between * NETWORK_HOP

    @property
    def arithmetic(self) -> float:
        """FLOP/s of a device."""
        return self.device.flops * (self.reached or (CPU_SHARE if self.device.on_cpu else ACCELERATOR_SHARE))


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
    arithmetic = flops / fleet.arithmetic

    told = said(sizes, ds_config, fleet.ranks, micro_batches)
    takes = told.bytes(size, fleet.ranks) / fleet.wire + told.collectives * fleet.latency
    hidden = min(OVERLAP * takes, arithmetic) if zero.get("overlap_comm") else 0.0

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
    return Seconds(arithmetic, takes - hidden, stepped / memory, offload)
