"""Reads a ds_config and joins it with run.yaml: run.yaml owns the science, the ds_config owns the machine."""

from __future__ import annotations

import copy
import difflib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from recyclable.errors import InputError
from recyclable.host import on_cpu as machine_is_cpu
from recyclable.resources import ds_config_path
from recyclable.weights.strict_json import read_json

# What DeepSpeed 0.19 reads (tests/test_machine.py watches it read) and a run here can use.
_KEYS = """
    activation_checkpointing aio bf16 bfloat16 comet comms_logger communication_data_type compile csv_monitor
    data_types dataloader_drop_last disable_allgather disable_python_gc dump_state flops_profiler fp16
    gradient_accumulation_steps gradient_allreduce_op gradient_clipping gradient_predivide_factor log_level
    managed_gradient_accumulation memory_breakdown prescale_gradients steps_per_print tensorboard timers torch_autocast
    train_batch_size train_micro_batch_size_per_gpu vocabulary_size wall_clock_breakdown wandb
    zero_allow_untested_optimizer zero_force_ds_cpu_optimizer zero_optimization
"""
_ZERO_KEYS = """
    allgather_bucket_size allgather_partitions compute_grad_norm contiguous_gradients cpu_offload cpu_offload_param
    cpu_offload_use_pin_memory elastic_checkpoint enable_sanity_checks ignore_unused_parameters leaf_module
    legacy_stage1 load_from_fp32_weights log_trace_cache_warnings memory_efficient_linear offload_optimizer
    offload_param overlap_comm override_module_apply parameter_alignment pipeline_loading_checkpoint
    reduce_bucket_size reduce_scatter round_robin_gradients save_muon_momentum_buffer_in_memory stage
    stage3_allgather_sequential stage3_gather_16bit_weights_on_model_save stage3_gather_fp16_weights_on_model_save
    stage3_max_live_parameters stage3_max_reuse_distance stage3_model_persistence_threshold
    stage3_module_granularity_threshold stage3_param_persistence_threshold stage3_prefetch_bucket_size
    stage3_use_all_reduce_for_fetch_params sub_group_size use_multi_rank_bucket_allreduce zenflow
    zero_hpz_partition_size zero_quantized_gradients zero_quantized_nontrainable_weights zero_quantized_weights
"""
KNOWN_KEYS = frozenset(_KEYS.split())
KNOWN_ZERO_KEYS = frozenset(_ZERO_KEYS.split())
CHECKPOINTING_KEYS = frozenset({"cpu_checkpointing"})
"""What is read of DeepSpeed's section `activation_checkpointing`, which turns gradient checkpointing on."""
PRECISION_KEYS = frozenset({"fp16", "bf16", "bfloat16", "torch_autocast", "data_types"})
"""What decides the precision of weights and arithmetic."""
MASTERED_AT_ONCE = 100_000_000
"""Elements of bf16 gradients that are in fp32 at a time at stage 0, or one larger tensor's."""
_TRAINING_KEYS = frozenset(
    {"tensorboard", "wandb", "csv_monitor", "comet", "train_batch_size", "train_micro_batch_size_per_gpu"}
    | {"gradient_accumulation_steps", "gradient_clipping"}
)
_OFFLOADED = (("offload_optimizer", 1), ("offload_param", 3))
"""What may be kept elsewhere, and the ZeRO stage from which on."""
_OFFLOAD_NUMBERS = {"buffer_count", "buffer_size", "max_in_cpu"}
_OFFLOAD_DEVICES = ("none", "cpu", "nvme")
_SIZES = ("_size", "_threshold", "_parameters", "_distance")
"""How keys of numbers of elements end."""
_BF16 = ("bf16", "bfloat16")
_NEED_STAGE = {
    "zero_optimization": (
        *("cpu_offload", "cpu_offload_param", "zenflow", "zero_quantized_weights", "zero_quantized_gradients"),
        "zero_quantized_nontrainable_weights",
    ),
    "data_types": ("grad_accum_dtype",),
    "fp16": ("enabled",),
    "torch_autocast": ("enabled",),
    **dict.fromkeys(_BF16, ("bf16_master_weights_and_grads", "bf16_optimizer_states")),
}
"""Section -> keys with which ZeRO's stages do more than share out, on one rank too: they keep things elsewhere or in
another precision. Under autocast gradients are rounded to 16 bits on their way to the other ranks."""
_AUTOCAST_DTYPES = {"bfloat16": "bfloat16", "bf16": "bfloat16", "float16": "float16", "fp16": "float16"}
# Sections DeepSpeed reads that would change what is learned, or need an engine other than the one used here.
REFUSED = {
    "optimizer": "belongs to the run config: learning_rate, weight_decay, adam_beta1, adam_beta2, adam_epsilon",
    "scheduler": "belongs to the run config: lr_scheduler_type, warmup_steps, max_steps",
    "elasticity": "would change the global batch; train_batch_size in the run config is fixed",
    "data_efficiency": "would change which examples are seen; the run config decides that",
    "curriculum_learning": "would change which examples are seen; the run config decides that",
    "compression_training": "would change the model; it is not supported",
    "progressive_layer_drop": "would change the model; it is not supported",
    "quantize_training": "would change the model; it is not supported",
    "weight_quantization": "would change the model; it is not supported",
    "pipeline": "is not supported, ranks are data-parallel: use ZeRO stage 3 for large models",
    "tensor_parallel": "is not supported, ranks are data-parallel: use ZeRO stage 3 for large models",
    "expert_parallel": "is not supported, ranks are data-parallel",
    "sequence_parallel_size": "is not supported, ranks are data-parallel",
    "hybrid_engine": "is not supported, it is for generation during training",
    "autotuning": "is not supported: name the batch and the ZeRO stage yourself",
    "checkpoint": "is read by nothing, checkpoints are recyclable's own: save_every and the like in the run config",
    "datastates_ckpt": "is read by nothing, checkpoints are recyclable's own and written in the background",
    "amp": "is no longer in DeepSpeed: use bf16 or torch_autocast",
}


def load_ds_config(path_or_name: str | Path) -> dict[str, Any]:
    """Read a ds_config given by path or by the name of a shipped one.

    Raises InputError for a missing file, broken JSON (with line and column), a key given twice, anything but an object.
    """
    return read_json(ds_config_path(path_or_name), finite=True, expected="a DeepSpeed config")


def merge(
    ds_config: dict[str, Any],
    *,
    where: str | Path,
    train_batch_size: int,
    max_grad_norm: float,
    world_size: int,
    gradient_checkpointing: bool | None = None,
    run: str | Path = "run.yaml",
    on_cpu: bool | None = None,
) -> dict[str, Any]:
    """The complete DeepSpeed config of a run, a new dict.

    Args:
        where: the ds_config's file, for messages.
        train_batch_size: examples per optimizer step over all ranks, from the run config.
        max_grad_norm: global norm gradients are clipped to, from the run config; 0 leaves them alone.
        gradient_checkpointing: from the run config; None leaves it to the ds_config.
        run: the run config's file, for messages.
        on_cpu: whether training runs on the CPU; None looks at this machine.

    Raises InputError for everything the ds_config must not say, and for batch sizes that do not come out whole.
    """
    config = copy.deepcopy(ds_config)
    _check_keys(config, where)
    _check_precision(config, where, machine_is_cpu() if on_cpu is None else on_cpu)
    stage = _checked_stage(config, where)
    _check_offload(config, stage, where)
    _check_watch(config, where)
    if config.get("gradient_allreduce_op", "mean") != "mean":
        raise InputError(
            where, f"gradient_allreduce_op is {config['gradient_allreduce_op']!r}, losses here need 'mean'"
        )
    _same(config, "train_batch_size", train_batch_size, "train_batch_size", where, run)
    _same(config, "gradient_clipping", max_grad_norm, "max_grad_norm", where, run)
    _settle_checkpointing(config, gradient_checkpointing, where, run)
    micro, steps = _batch(config, where, run, train_batch_size, world_size)
    config.update(
        train_batch_size=train_batch_size,
        train_micro_batch_size_per_gpu=micro,
        gradient_accumulation_steps=steps,
        gradient_clipping=float(max_grad_norm),  # written out even when 0: DeepSpeed clips to 1.0 when it is left out
    )
    # DeepSpeed would wait for the device at each pass, to measure a speed that nobody reads: Monitor has its own
    config.setdefault("timers", {"throughput": {"enabled": False}})
    if stage > 0:
        # The run's optimizer is handed to DeepSpeed, which would refuse some kinds under ZeRO and offload.
        config.setdefault("zero_allow_untested_optimizer", True)
        config.setdefault("zero_force_ds_cpu_optimizer", False)
    return config


def without_training(ds_config: dict[str, Any], world_size: int) -> dict[str, Any]:
    """The complete DeepSpeed config of an engine that only computes, a new dict; the batches are whatever it is given.

    Raises InputError for everything the ds_config must not say.
    """
    config = {name: value for name, value in ds_config.items() if name not in _TRAINING_KEYS}
    return merge(config, where="ds_config", train_batch_size=world_size, max_grad_norm=0.0, world_size=world_size)


def as_run(config: dict[str, Any], world_size: int) -> dict[str, Any]:
    """The config that DeepSpeed is given: on one rank there is nothing to share out, and stages 1 to 3 are run as 0.

    Sharing out to nobody costs a small model several times its arithmetic (a hook at each gradient, each layer gathered
    and let go). Where a stage does more than that it is as the config says. But fp16 at stage 0 is run as 1: there
    DeepSpeed scales no loss, yet divides gradients by the scale, and takes a step before the first.
    """
    if _enabled(config, "fp16") and not zero_stage(config):
        return {**config, "zero_optimization": {**(config.get("zero_optimization") or {}), "stage": 1}}
    more = any((config.get(section) or {}).get(key) for section, keys in _NEED_STAGE.items() for key in keys)
    if world_size > 1 or more or homes(config) != ("none", "none") or not zero_stage(config):
        return config
    return {**config, "zero_optimization": {"stage": 0}}


def zero_stage(config: dict[str, Any]) -> int:
    """The ZeRO stage of a config, 0 to 3."""
    return (config.get("zero_optimization") or {}).get("stage", 0)


def recomputes(config: dict[str, Any]) -> bool:
    """Whether layers compute again in the backward pass (gradient checkpointing)."""
    return "activation_checkpointing" in config


def recomputing(config: dict[str, Any], wanted: bool | None) -> dict[str, Any]:
    """The config with layers that compute again where the run config wants them; as it is where it does not say."""
    return {"activation_checkpointing": {}, **config} if wanted else config


def homes(config: dict[str, Any]) -> tuple[str, str]:
    """Where the optimizer's states and the parameters are kept: none (with the device), cpu or nvme."""
    zero = config.get("zero_optimization") or {}
    optimizer, parameters = ((zero.get(name) or {}).get("device", "none") for name, _ in _OFFLOADED)
    return str(optimizer), str(parameters)


def saves_on_host(config: dict[str, Any]) -> bool:
    """Whether layers that compute again keep their inputs in host memory (activation offload)."""
    return recomputes(config) and config["activation_checkpointing"].get("cpu_checkpointing", False)


def is_bf16(config: dict[str, Any]) -> bool:
    """Whether the model itself is held in bf16 (with fp32 master weights)."""
    return any(_enabled(config, section) for section in _BF16)


def precision(config: dict[str, Any]) -> str:
    """What weights are held in while a model computes, by torch's name."""
    if is_bf16(config):
        return "bfloat16"
    return "float16" if _enabled(config, "fp16") else "float32"


def autocast(config: dict[str, Any]) -> str | None:
    """What products are computed in under torch's autocast, by torch's name; None without it."""
    return _AUTOCAST_DTYPES[config["torch_autocast"]["dtype"]] if _enabled(config, "torch_autocast") else None


def require_logits(wanted: str, config: dict[str, Any]) -> None:
    """InputError where logits are wanted in bf16 (`logits`) of a model that does not compute in it."""
    computed = autocast(config) or precision(config)
    if wanted == "bf16" and computed != "bfloat16":
        problem = f"is bf16, but the model computes in {computed}: expected fp32, or bf16 in the ds_config"
        raise InputError("logits", problem)


def whole_number(config: dict[str, Any], key: str, where: str | Path) -> int | None:
    """What a key says, None where it is not there; InputError where that is no whole number of at least 1."""
    value = config.get(key)
    if value is not None and (type(value) is not int or value < 1):
        raise InputError(where, f"{key} is {value!r}, expected a whole number of at least 1")
    return value


def _check_keys(config: dict[str, Any], where: str | Path) -> None:
    for path in _autos(config):
        raise InputError(where, f'{path} is "auto", expected a value; batch sizes and clipping may be left out')
    for key in config:
        if key in REFUSED:
            raise InputError(where, f"section {key!r} {REFUSED[key]}; remove it here")
        _check_known(key, "key", KNOWN_KEYS, where)
    zero = config.get("zero_optimization", {})
    if not isinstance(zero, dict):
        raise InputError(where, f'zero_optimization is {zero!r}, expected an object such as {{"stage": 2}}')
    for key in zero:
        # the stage-3 settings may be written without their prefix
        if f"stage3_{key}" not in KNOWN_ZERO_KEYS:
            _check_known(key, "zero_optimization key", KNOWN_ZERO_KEYS, where)


def _check_known(key: str, kind: str, known: frozenset[str], where: str | Path) -> None:
    if key not in known:
        near = difflib.get_close_matches(key, sorted(known), n=1)
        hint = f", did you mean {near[0]!r}?" if near else "; DeepSpeed does not read it"
        raise InputError(where, f"unknown {kind} {key!r}{hint}")


def _autos(value: Any, path: str = "") -> Iterator[str]:
    if value == "auto":
        yield path
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _autos(inner, f"{path}.{key}" if path else key)
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from _autos(inner, f"{path}[{i}]")


def _check_precision(config: dict[str, Any], where: str | Path, on_cpu: bool) -> None:
    for section in ("fp16", "bf16", "bfloat16", "torch_autocast"):
        found = config.get(section, {})
        if not isinstance(found, dict) or not isinstance(found.get("enabled", False), bool):
            raise InputError(where, f'{section} is {found!r}, expected an object such as {{"enabled": true}}')
    if _enabled(config, "fp16") and is_bf16(config):
        raise InputError(where, "fp16 and bf16 are both enabled, expected one of them at most")
    half = "fp16" if _enabled(config, "fp16") else None
    if _enabled(config, "torch_autocast"):
        dtype = config["torch_autocast"].get("dtype")
        if dtype not in _AUTOCAST_DTYPES:
            raise InputError(where, f"torch_autocast.dtype is {dtype!r}, expected 'bfloat16' or 'float16'")
        if autocast(config) == "float16":
            half = "torch_autocast in float16"
    if half and on_cpu:
        raise InputError(where, f"{half} is enabled, but training runs on the CPU: use bf16 or leave it out for fp32")


def _enabled(config: dict[str, Any], section: str) -> bool:
    return bool(config.get(section, {}).get("enabled", False))


def _checked_stage(config: dict[str, Any], where: str | Path) -> int:
    stage = zero_stage(config)
    if type(stage) is not int or not 0 <= stage <= 3:
        raise InputError(where, f"zero_optimization.stage is {stage!r}, expected 0, 1, 2 or 3")
    return stage


def _check_offload(config: dict[str, Any], stage: int, where: str | Path) -> None:
    """What is offloaded must be there to be offloaded, at a stage where DeepSpeed does it."""
    zero = config.get("zero_optimization") or {}
    for section, least in _OFFLOADED:
        found, field = zero.get(section), f"zero_optimization.{section}"
        if found is None:
            continue
        device = found.get("device", "none") if isinstance(found, dict) else None
        if device not in _OFFLOAD_DEVICES:
            expected = f'an object with a device of {", ".join(_OFFLOAD_DEVICES)}, such as {{"device": "cpu"}}'
            raise InputError(where, f"{field} is {found!r}, expected {expected}")
        wanted = 3 if device == "nvme" else least
        if device != "none" and stage < wanted:
            raise InputError(where, f"{field}.device is {device!r} at stage {stage}, expected stage {wanted} or more")
        if not isinstance(found.get("nvme_path", ""), str):
            raise InputError(where, f"{field}.nvme_path is {found['nvme_path']!r}, expected a directory")
        for key in _OFFLOAD_NUMBERS & found.keys():
            if type(found[key]) not in (int, float) or not 0 <= found[key] < math.inf:
                raise InputError(where, f"{field}.{key} is {found[key]!r}, expected a number of at least 0")
    for key, value in zero.items():
        if key.endswith(_SIZES) and (isinstance(value, bool) or not isinstance(value, int | float) or value < 0):
            raise InputError(where, f"zero_optimization.{key} is {value!r}, expected a number of elements")
    if zero.get("round_robin_gradients"):
        problem = "is true, but DeepSpeed then mistakes which weights are whose where they are saved"
        raise InputError(where, f"zero_optimization.round_robin_gradients {problem}: remove it")


def _check_watch(config: dict[str, Any], where: str | Path) -> None:
    """What DeepSpeed looks at to find gradients that are no numbers; else they would reach the weights."""
    for section, key in (("zero_optimization", "compute_grad_norm"), *((s, "check_grad_overflow") for s in _BF16)):
        if (config.get(section) or {}).get(key) is False:
            raise InputError(where, f"{section}.{key} is false, but bad steps are found by it: remove it")


def _settle_checkpointing(config: dict[str, Any], wanted: bool | None, where: str | Path, run: str | Path) -> None:
    """Have the section in the config where layers are to compute again."""
    section = config.get("activation_checkpointing", {})
    if not isinstance(section, dict):
        raise InputError(where, f"activation_checkpointing is {section!r}, expected an object such as {{}}")
    for key, value in section.items():
        if key not in CHECKPOINTING_KEYS:
            read = ", ".join(sorted(CHECKPOINTING_KEYS))
            raise InputError(where, f"activation_checkpointing key {key!r} is read by nothing here, expected {read}")
        if not isinstance(value, bool):
            raise InputError(where, f"activation_checkpointing.{key} is {value!r}, expected true or false")
    if recomputes(config) and wanted is False:
        raise InputError(
            where,
            f"activation_checkpointing is given, but gradient_checkpointing in {run} is false: "
            "make them equal or remove one of them",
        )
    if wanted:
        config.setdefault("activation_checkpointing", {})


def _same(config: dict[str, Any], key: str, value: float, field: str, where: str | Path, run: str | Path) -> None:
    if key in config and config[key] != value:
        raise InputError(
            where, f"{key} is {config[key]!r}, but {field} in {run} is {value!r}: make them equal or remove it here"
        )


def _batch(
    config: dict[str, Any], where: str | Path, run: str | Path, train_batch_size: int, world_size: int
) -> tuple[int, int]:
    """Micro-batch per rank and accumulation steps, so that micro x steps x ranks = train_batch_size."""
    micro = whole_number(config, "train_micro_batch_size_per_gpu", where)
    steps = whole_number(config, "gradient_accumulation_steps", where)
    total = f"train_batch_size {train_batch_size} in {run}"
    if train_batch_size % world_size:
        raise InputError(run, f"train_batch_size {train_batch_size} is not divisible by the {world_size} ranks")
    share = train_batch_size // world_size
    if micro and steps:
        if micro * steps != share:
            raise InputError(
                where,
                f"train_micro_batch_size_per_gpu {micro} x gradient_accumulation_steps {steps} x {world_size} ranks = "
                f"{micro * steps * world_size}, but {total}: remove gradient_accumulation_steps or change one of them",
            )
        return micro, steps
    given, key = (steps, "gradient_accumulation_steps") if steps else (micro, "train_micro_batch_size_per_gpu")
    given = given or share
    if share % given:
        fitting = max(divisor for divisor in range(1, min(given, share) + 1) if share % divisor == 0)
        raise InputError(
            where,
            f"{key} {given} x {world_size} ranks does not divide {total}: use {fitting} here, "
            f"or a train_batch_size that is a multiple of {given * world_size}",
        )
    return (share // given, given) if steps else (given, share // given)
