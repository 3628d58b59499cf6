"""The ways to lay a run out over devices: ZeRO's stages, layers computed again, states kept on the host or on NVMe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from recyclable.planning.swapping import BUFFER

Home = Literal["device", "cpu", "nvme"]

NVME_PATH = "/local_nvme"


@dataclass(frozen=True)
class Regime:
    """One way."""

    stage: int
    recomputes: bool = False
    """Layers keep their inputs alone, and compute again in the backward pass."""
    optimizer: Home = "device"
    parameters: Home = "device"

    @property
    def name(self) -> str:
        """As the table and the shipped files have it."""
        kept = {"device": "", "cpu": "_offload", "nvme": "_nvme"}
        where = "_offload_optimizer" if self.optimizer == "cpu" and self.parameters == "device" else ""
        return f"zero{self.stage}{where or kept[self.optimizer]}{'_checkpointing' if self.recomputes else ''}"


def regimes() -> list[Regime]:
    """All of them, those first that have the least to do beside the arithmetic."""
    kept: list[tuple[int, Home, Home]] = [(stage, "device", "device") for stage in range(4)]
    kept += [(2, "cpu", "device"), (3, "cpu", "device"), (3, "cpu", "cpu"), (3, "nvme", "nvme")]
    return [Regime(stage, again, *homes) for stage, *homes in kept for again in (False, True)]


@dataclass(frozen=True)
class Shape:
    """What settings of DeepSpeed are chosen by."""

    hidden: int
    parameters: int
    bf16: bool
    overlap: bool
    """Whether communication has the arithmetic's company: on a CPU they share the cores."""
    largest: int = 0
    """Elements of a rank's part of the largest tensor."""


def ds_config(regime: Regime, shape: Shape, micro_batch: int | None = None, nvme: str = NVME_PATH) -> dict[str, Any]:
    """DeepSpeed's config of a regime (ds_configs/README.md says why these numbers).

    Args:
        nvme: the directory that things are kept in on NVMe.
    """
    config: dict[str, Any] = {} if micro_batch is None else {"train_micro_batch_size_per_gpu": micro_batch}
    if shape.bf16:
        config["bf16"] = {"enabled": True}
    if regime.recomputes:
        config["activation_checkpointing"] = {}
    zero = config["zero_optimization"] = {"stage": regime.stage}
    if regime.stage:
        zero |= {"overlap_comm": shape.overlap, "contiguous_gradients": True}
    bucket = 50_000_000 if shape.parameters < 6e8 else 100_000_000 if shape.parameters < 2e9 else 200_000_000
    if regime.stage in (1, 2):
        zero |= {"reduce_scatter": True, "reduce_bucket_size": bucket}
        zero |= {"allgather_partitions": True, "allgather_bucket_size": bucket}
    if regime.stage == 3:
        square, live = shape.hidden**2, 500_000_000 if shape.parameters < 5e9 else 1_000_000_000
        live = live if regime.parameters == "device" else 300_000_000
        zero |= {"reduce_bucket_size": square, "stage3_prefetch_bucket_size": square * 9 // 10 if shape.overlap else 0}
        zero |= {"stage3_param_persistence_threshold": 10 * shape.hidden}
        zero |= {"stage3_max_live_parameters": live, "stage3_max_reuse_distance": live}
    for section, home in (("offload_optimizer", regime.optimizer), ("offload_param", regime.parameters)):
        if home != "device":
            zero[section] = {
                "device": home,
                **({"nvme_path": nvme} if home == "nvme" else {}),
                "pin_memory": shape.bf16,
            }
    if regime.parameters == "nvme" and shape.largest > BUFFER:
        zero["offload_param"]["buffer_size"] = shape.largest
    if regime.optimizer != "device" and regime.stage == 3:
        zero["sub_group_size"] = 100_000_000
    return config
