"""Seconds of a step against ZeRO's volumes written out, and which device is which by the names that torch gives."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from recyclable.planning import devices
from recyclable.planning.devices import Device, by_torch_name, free_memory, peak_flops
from recyclable.planning.states import Sizes
from recyclable.planning.time import (
    ACCELERATOR_SHARE,
    BANDWIDTH_SHARE,
    CPU_SHARE,
    HOP,
    HOST,
    NETWORK_HOP,
    NVME,
    START,
    Fleet,
    seconds,
)

TRAINED, FROZEN, TAUGHT = 1000, 500, 250
SIZES = Sizes({"w": TRAINED}, {"f": FROZEN}, {"t": TAUGHT}, frozenset("w"), frozenset())
DEVICE = Device("d", 1e9, flops=1e6, bandwidth=1e5, link=1e4, host_link=2e3, network=1e3)
BF16 = {"bf16": {"enabled": True}}
N = 4
FLEET = Fleet(DEVICE, N)


def of(zero: dict[str, Any], micro_batches: int = 1, fleet: Fleet = FLEET, **more: Any) -> Any:
    return seconds(2e6, micro_batches, SIZES, {"zero_optimization": zero, **BF16, **more}, fleet)


def said(elements: float, bandwidth: float = DEVICE.link, ranks: int = N) -> float:
    """Seconds that so many bf16 elements take, of which a rank has its own."""
    return 2 * elements * (ranks - 1) / ranks / (BANDWIDTH_SHARE * bandwidth)


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_each_stage_says_what_deepspeed_does(micro_batches: int):
    m, student = micro_batches, TRAINED + FROZEN
    volumes = [2 * TRAINED, 3 * TRAINED, (2 * m + 1) * TRAINED, m * (2 * student + TAUGHT + TRAINED)]
    found = [of({"stage": stage}, m).communication for stage in range(4)]
    assert found == pytest.approx([said(volume) for volume in volumes], rel=1e-3)
    again = of({"stage": 3}, m, activation_checkpointing={})
    assert again.communication == pytest.approx(said(volumes[3] + m * student), rel=1e-3)
    # as Rajbhandari et al. have it
    papers = [of({"stage": stage, "use_multi_rank_bucket_allreduce": False}, m).communication for stage in (1, 2)]
    assert papers == pytest.approx([said(2 * TRAINED), said((m + 1) * TRAINED)], rel=1e-3)


def test_one_rank_says_nothing_and_hosts_talk_through_the_networks_of_all_their_devices():
    assert of({"stage": 3}, fleet=Fleet(DEVICE, 1)).communication == 0
    slow = of({"stage": 0}, fleet=Fleet(DEVICE, N, 2)).communication
    assert slow == pytest.approx(said(2 * TRAINED, 2 * DEVICE.network), rel=1e-3)
    wide = replace(DEVICE, network=DEVICE.link)
    assert Fleet(wide, N, 2).wire == Fleet(wide, N).wire == BANDWIDTH_SHARE * DEVICE.link


def test_every_collective_goes_around_the_ring():
    quick = replace(DEVICE, link=1e20, network=1e20)
    pieces = {"stage": 1, "reduce_bucket_size": TRAINED / 5, "allgather_bucket_size": TRAINED / 2}
    for hosts in (1, 2, 4):
        hops = (N - hosts) * HOP + (hosts - 1) * NETWORK_HOP
        found = of(pieces, fleet=Fleet(quick, N, hosts)).communication
        assert found == pytest.approx((5 + 2) * (START + hops))


def test_the_arithmetic_hides_half_of_what_is_said_at_most():
    apart, beside = (of({"stage": 1, "overlap_comm": overlap}) for overlap in (False, True))
    assert beside.communication == pytest.approx(apart.communication / 2)
    quick = Fleet(replace(DEVICE, flops=1e12), N)
    shown = of({"stage": 1, "overlap_comm": True}, fleet=quick)
    assert shown.communication == pytest.approx(apart.communication - shown.arithmetic)


def test_arithmetic_is_a_share_of_the_rate_and_a_cpu_reaches_what_was_measured():
    assert of({}).arithmetic == pytest.approx(2 / ACCELERATOR_SHARE)
    assert of({}, fleet=replace(FLEET, reached=0.25)).arithmetic == pytest.approx(2 / 0.25)
    here = of({"stage": 1}, fleet=Fleet(replace(DEVICE, on_cpu=True), N))
    assert here.arithmetic == pytest.approx(2 / CPU_SHARE)
    assert here.communication == pytest.approx(BANDWIDTH_SHARE * said(3 * TRAINED), rel=1e-2)
    assert here.optimizer == pytest.approx(28 * TRAINED / N / DEVICE.bandwidth)


def test_what_lies_elsewhere_is_carried_there_and_back():
    on_host, on_nvme = {"device": "cpu"}, {"device": "nvme", "nvme_path": "/nvme"}
    link, own = BANDWIDTH_SHARE * DEVICE.host_link, TRAINED / N
    read = 2 * (2 * (TRAINED + FROZEN) + TAUGHT) / N  # bytes of a micro-batch
    assert of({"stage": 3}).offload == 0
    found = of({"stage": 2, "offload_optimizer": on_host}, 3)
    assert found.offload == pytest.approx((3 + 1) * 2 * own / link)
    assert found.optimizer == pytest.approx(28 * own / min(HOST, BANDWIDTH_SHARE * DEVICE.bandwidth))
    both = of({"stage": 3, "offload_optimizer": on_host, "offload_param": on_host})
    assert both.offload == pytest.approx(2 * 2 * own / link + read / link)
    nvme = of({"stage": 3, "offload_optimizer": on_nvme, "offload_param": on_nvme})
    assert nvme.offload == pytest.approx(both.offload + (read + 24 * own) / (NVME / N))
    assert nvme.total == nvme.arithmetic + nvme.communication + nvme.optimizer + nvme.offload


@pytest.mark.parametrize(
    ("torch_name", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA A100 80GB PCIe", "a100-80gb-pcie"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA A10", "a10"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA L40", "l40"),
        ("NVIDIA A10G", None),
        ("NVIDIA GH200 480GB", None),
        ("AMD Instinct MI300X", "mi300x"),
    ],
)
def test_a_device_is_known_by_its_whole_name(torch_name: str, name: str | None):
    found = by_torch_name(torch_name)
    assert (found and found.name) == name


def test_free_memory_is_the_least_of_the_machines_and_the_control_groups(tmp_path: Path, monkeypatch: Any):
    monkeypatch.setattr(devices, "_CGROUP", tmp_path)
    monkeypatch.setattr(devices.psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    assert free_memory() == 1000  # no control group
    for limit, used, cached, free in (("max", 5, 0, 1000), (900, 500, 100, 500), (9000, 500, 0, 1000)):
        (tmp_path / "memory.max").write_text(f"{limit}\n")
        (tmp_path / "memory.current").write_text(f"{used}\n")
        (tmp_path / "memory.stat").write_text(f"active_file 7\ninactive_file {cached}\n")
        assert free_memory() == free


def test_this_cpu_is_shared_by_its_ranks(monkeypatch: Any):
    monkeypatch.setattr(devices, "_product_rate", lambda *_: 8e9)
    monkeypatch.setattr(devices, "_copy_rate", lambda *_: 4e9)
    monkeypatch.setattr(devices, "free_memory", lambda: 2e9)
    found = devices.this_cpu(2)
    assert (found.flops, found.bandwidth, found.memory, found.on_cpu) == (4e9, 2e9, 1e9, True)


def test_without_an_accelerator_there_is_no_peak_to_compare_with(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert peak_flops() is None


def test_the_longest_device_name_wins(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    for name, peak in {
        "NVIDIA H100 PCIe": 756e12,
        "NVIDIA H200": 989e12,
        "NVIDIA L40S": 362e12,
        "NVIDIA L4": 121e12,
    }.items():
        monkeypatch.setattr("torch.cuda.get_device_name", lambda name=name: name)
        assert peak_flops() == peak
