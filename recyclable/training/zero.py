"""The only file that knows how ZeRO lays out parameters: values into its partitions, and out of them, range by range.

ZeRO-3 cuts each parameter into equal ranges, one per rank; ZeRO-1 and 2 cut the optimizer's fp32 copy of all of them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeGuard
from unittest.mock import patch

import deepspeed
import torch
from deepspeed import DeepSpeedEngine
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.zero.linear import zero3_linear_wrap
from deepspeed.runtime.zero.offload_config import OffloadDeviceEnum
from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
from deepspeed.runtime.zero.partition_parameters import PartitionedParamStatus, ZeroParamStatus, is_zero_param
from deepspeed.utils import safe_get_local_fp32_param
from torch import nn
from torch.nn import functional

from recyclable import distributed, machine
from recyclable.errors import InputError
from recyclable.training.swapped import is_swapped, own_masters
from recyclable.training.whole import master_of
from recyclable.weights.checkpoint_files import Ranged
from recyclable.weights.digest import element_ranges
from recyclable.weights.sources import Read, Unread, become, fill, held, is_unread, read_into

Shapes = dict[str, tuple[torch.dtype, tuple[int, ...]]]


class Partitioned(nn.Parameter):
    """The attributes that ZeRO-3 gives a parameter; there are no instances."""

    ds_tensor: Any
    """This rank's partition, a tensor with attributes of its own."""
    ds_numel: int
    ds_numel_aligned: int
    ds_shape: torch.Size
    ds_status: ZeroParamStatus
    ds_zero_partition_rank: int
    ds_zero_partition_world_size: int

    def partition(self) -> None:
        """Lets go of all that other ranks keep."""
        raise NotImplementedError


def _is_partitioned(parameter: nn.Parameter) -> TypeGuard[Partitioned]:
    return is_zero_param(parameter)


def is_partitioned(module: nn.Module) -> bool:
    """Whether any parameter is shared out to the ranks, which must then compute together."""
    return any(_is_partitioned(parameter) for parameter in module.parameters())


def materialize(module: nn.Module, ds_config: dict[str, Any]) -> None:
    """Read a module's unread parameters to where the engine that `ds_config` describes will want them.

    Under ZeRO-3 each rank reads its own range of each parameter into its partition: nothing is gathered or broadcast,
    and no rank allocates a whole tensor. Below, a rank reads every parameter whole, in the precision and on the device
    that it will have. Parameters that have values already are partitioned from them. Does nothing the second time.

    Two ways to store ZeRO-3's partitions need whole parameters on the way (ZeRO++'s second partition on each host and
    its quantized frozen weights): with them it is as below ZeRO-3, and DeepSpeed partitions.
    """
    # DeepSpeed would partition a module that has all its values, but takes fp32 weights to NVMe in bf16 on a CPU.
    if not is_unread(module) and (machine.zero_stage(ds_config) < 3 or is_partitioned(module)):
        return
    config = DeepSpeedConfig(copy.deepcopy(ds_config))
    zero = config.zero_config
    if zero.stage < 3 or zero.zero_hpz_partition_size > 1 or zero.zero_quantized_nontrainable_weights:
        half = torch.bfloat16 if config.bfloat16_config.enabled else torch.float16
        precise = not (config.bfloat16_config.enabled or config.float16_config.enabled)
        in_memory = "cpu" if zero.stage == 3 else get_accelerator().current_device_name()
        fill(module, torch.float32 if precise else half, in_memory)
        return
    # As a context it would do all this while modules are built; here they are, and lack nothing but values.
    init = deepspeed.zero.Init(config_dict_or_path=copy.deepcopy(ds_config))
    for buffer in module.buffers():
        buffer.data = buffer.data.to(init.local_device)
    init._keep_in_fp32(module)
    whole = [parameter for parameter in module.parameters() if not is_zero_param(parameter)]
    read_into([left for parameter in whole if (left := _partition(init, parameter))])


@contextmanager
def its_products(ds_config: dict[str, Any]) -> Iterator[None]:
    """While it lasts linear layers compute as the engine that `ds_config` describes wants it.

    ZeRO-3 puts a product of its own, which keeps no gathered weight, in the place of torch's. DeepSpeed leaves it there
    for good, and whatever the process computes later would be rounded otherwise.
    """
    usual = functional.linear
    own = (ds_config.get("zero_optimization") or {}).get("memory_efficient_linear", True)
    try:
        if machine.zero_stage(ds_config) == 3 and own:
            functional.linear = zero3_linear_wrap
        yield
    finally:
        functional.linear = usual


@contextmanager
def each_layer_alone(computes: Callable[..., Any]) -> Iterator[None]:
    """While it lasts, ZeRO-3 has parameters whole only as long as their layer computes.

    It learns the order of layers in a forward pass, to fetch ahead and to keep what soon comes again. Where one forward
    is many passes of a model inside, everything soon comes again: the whole model would be kept on every rank.

    Args:
        computes: an engine; anything else has no partitions, and is left alone.
    """
    optimizer = getattr(computes, "optimizer", None)
    offload = getattr(optimizer, "parameter_offload", optimizer)  # of an engine that does not train it is all there is
    if not isinstance(computes, DeepSpeedEngine) or not isinstance(offload, DeepSpeedZeRoOffload):
        yield
        return
    order = offload.get_param_coordinator()
    if not order.is_invalid_trace():
        order._invalidate_trace()
    with patch.object(order, "reset_step", lambda: None):  # which would begin to learn
        yield


def let_go(module: nn.Module) -> None:
    """Give up a module's partitions: DeepSpeed goes on referring to the parameters of an engine that has ended."""
    for parameter in module.parameters():
        if _is_partitioned(parameter):
            parameter.ds_tensor.data = parameter.ds_tensor.new_empty(0)


def gather_with(module: nn.Module, parameter: nn.Parameter) -> None:
    """Make ZeRO-3 gather another module's parameter whenever it gathers this module's own."""
    deepspeed.zero.register_external_parameter(module, parameter)


def _partition(init: deepspeed.zero.Init, parameter: nn.Parameter) -> tuple[torch.Tensor, Read, int] | None:
    """Turn a parameter into one of ZeRO-3's; returns its partition on this rank, without padding, as `read_into` wants.

    What `Init._partition_param` does, but for the copy from a whole tensor. A partition on NVMe is read and written at
    once, one at a time in memory: there is nothing left to read then.
    """
    read = parameter.read if isinstance(parameter, Unread) else held(parameter)
    shape, trained = parameter.shape, parameter.requires_grad
    without_memory = torch.zeros((), dtype=init.dtype, device=init.local_device).expand(shape)
    become(parameter, nn.Parameter(without_memory, requires_grad=trained))
    init._convert_to_deepspeed_param(parameter)
    assert _is_partitioned(parameter)
    aligned = init._aligned_size(parameter)
    size = aligned // parameter.ds_zero_partition_world_size
    on_nvme = init.param_swapper is not None and init.param_swapper.swappable_tensor(numel=size)
    if on_nvme:
        partition = torch.empty(0, dtype=init.dtype)
        partition.data = _buffer(init.param_swapper, parameter, size).zero_()
    else:
        partition = torch.zeros(size, dtype=init.dtype, device=_home(init))
        if init.pin_memory:
            partition = get_accelerator().pin_memory(partition)
    parameter.ds_tensor, parameter.ds_numel_aligned = partition, aligned
    parameter.ds_tensor.ds_numel = size
    parameter.ds_tensor.status = PartitionedParamStatus.AVAILABLE
    parameter.ds_tensor.final_location = OffloadDeviceEnum.nvme if on_nvme else None
    start, stop = own_range(parameter)
    if on_nvme:
        read_into([(partition[: stop - start], read, start)])
        init.param_swapper.swap_out_and_release([parameter])
    parameter.partition()  # has its partition already: lets go of the rest
    return None if on_nvme else (partition[: stop - start], read, start)


def _buffer(swapper: Any, parameter: nn.Parameter, size: int) -> torch.Tensor:
    """Memory for a partition on its way to NVMe."""
    if size > swapper.elements_per_buffer:
        problem = f"is {swapper.elements_per_buffer}, expected at least a rank's share of the largest tensor, {size}"
        raise InputError("zero_optimization.offload_param.buffer_size", problem)
    return swapper.get_buffer(parameter, size)


def _home(init: deepspeed.zero.Init) -> torch.device | str:
    in_memory = init.remote_device in (OffloadDeviceEnum.cpu, OffloadDeviceEnum.nvme)  # what is too small for NVMe
    return "cpu" if in_memory else init.local_device


def own_range(parameter: Any) -> tuple[int, int]:
    """The elements of one of ZeRO-3's parameters that lie in this rank's partition."""
    size = parameter.ds_tensor.ds_numel
    start = min(parameter.ds_zero_partition_rank * size, parameter.ds_numel)
    return start, min(start + size, parameter.ds_numel)


def full_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """A parameter's shape, whether partitioned or not."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def bytes_held(parameter: nn.Parameter) -> int:
    """Bytes of a parameter that this rank has taken."""
    return (0 if parameter.is_meta else parameter.nbytes) + getattr(getattr(parameter, "ds_tensor", None), "nbytes", 0)


def trainable_shapes(module: nn.Module) -> Shapes:
    """Name -> (fp32, full shape) of the trainable parameters, whether partitioned or not."""
    return {name: (torch.float32, full_shape(p)) for name, p in module.named_parameters() if p.requires_grad}


def own_pieces(module: nn.Module) -> Iterator[tuple[str, int, torch.Tensor]]:
    """(name, first element, flat fp32 values on the CPU): what this rank keeps of the trainable parameters.

    All ranks together have every element once. Under mixed precision the values are the optimizer's fp32 master copy,
    not the rounded one that the model computes with. Works inside an engine only.
    """
    if (optimizer := _optimizer(module)) is not None and is_swapped(optimizer):
        names = {parameter: name for name, parameter in module.named_parameters()}
        for parameter, values in own_masters(optimizer):
            if parameter in names and _is_partitioned(parameter):
                start, stop = own_range(parameter)
                yield names[parameter], start, values[: stop - start].float().cpu()
        return
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        if _is_partitioned(parameter):
            start, stop = own_range(parameter)
            values = safe_get_local_fp32_param(parameter)[: stop - start]
        elif hasattr(parameter, "_hp_mapping"):
            if parameter._hp_mapping is None:  # it lies in other ranks' partitions
                continue
            start = parameter._hp_mapping.lp_fragment_address.start
            values = parameter._hp_mapping.get_hp_fragment()
        else:  # plain data parallelism: every rank has it whole
            rank, world, size = distributed.rank(), distributed.world_size(), parameter.numel()
            start, stop = size * rank // world, size * (rank + 1) // world
            values = master_of(parameter).detach().reshape(-1)[start:stop]
        for begin, end in element_ranges(start, start + values.numel()):
            yield name, begin, values[begin - start : end - start].detach().float().cpu()


def _optimizer(module: nn.Module) -> Any:
    """ZeRO-3's, inside an engine; else None."""
    return next((p._z3_optimizer for p in module.parameters() if hasattr(p, "_z3_optimizer")), None)


def load_trainable(module: nn.Module, tensors: Ranged) -> None:
    """Read values, by name, into the trainable parameters that the model computes with (`overwrite`)."""
    trainable = ((name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad)
    overwrite([(parameter, partial(tensors.read, name)) for name, parameter in trainable])


def overwrite(values: Iterable[tuple[nn.Parameter, Read]]) -> None:
    """Read values into parameters that the model computes with, whole or each rank its own partition.

    The optimizer's master copies stay as they are, so this is for evaluating, not for training on.
    """
    targets: list[tuple[torch.Tensor, Read, int]] = []
    for parameter, read in values:
        if _is_partitioned(parameter):
            if parameter.ds_tensor.status != PartitionedParamStatus.AVAILABLE:  # on NVMe
                _overwrite_on_nvme(parameter, read)
                continue
            start, stop = own_range(parameter)
            targets.append((parameter.ds_tensor.data[: stop - start], read, start))
        if not _is_partitioned(parameter) or parameter.ds_status == ZeroParamStatus.AVAILABLE:
            targets.append((parameter.data.view(-1), read, 0))
    read_into(targets)


def _overwrite_on_nvme(parameter: Any, read: Read) -> None:
    """Read this rank's range of a parameter into its file."""
    start, stop = own_range(parameter)
    parameter.nvme_swapper.swap_in([parameter], async_op=False)
    read_into([(parameter.ds_tensor.data[: stop - start], read, start)])
    parameter.nvme_swapper.swap_out_and_release([parameter])
