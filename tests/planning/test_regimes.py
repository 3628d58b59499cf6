"""A regime's ds_config is one that a run takes: buffers on the way to NVMe hold a rank's part of the largest tensor."""

from __future__ import annotations

from typing import Any

from recyclable.planning.regimes import Regime, Shape, ds_config


def of_parameters(largest: int, **homes: Any) -> dict[str, Any]:
    shape = Shape(4096, 7_000_000_000, bf16=True, overlap=True, largest=largest)
    return ds_config(Regime(3, **homes), shape)["zero_optimization"].get("offload_param", {})


def test_buffers_on_the_way_to_nvme_are_as_large_as_they_must_be() -> None:
    nvme = {"optimizer": "nvme", "parameters": "nvme"}
    assert of_parameters(131_072_000, **nvme)["buffer_size"] == 131_072_000
    assert "buffer_size" not in of_parameters(65_536_000, **nvme)  # DeepSpeed's own does
    assert "buffer_size" not in of_parameters(131_072_000, optimizer="cpu", parameters="cpu")
