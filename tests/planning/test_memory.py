"""Predicted memory has the parts that ZeRO's arithmetic says, and moves where the ds_config puts it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, PreTrainedModel

from recyclable.models.build import auto_class, structure
from recyclable.objectives.token_distillation import TokenDistillation, TokenTeacher
from recyclable.objectives.token_loss import TokenLoss
from recyclable.planning.gathering import gathered
from recyclable.planning.memory import PARTS, Memory, memory, traced
from recyclable.planning.phases import phases
from recyclable.planning.states import Sizes, Zero, in_partition, steady
from recyclable.planning.swapping import largest_sub_group
from recyclable.planning.trace import Trace, Use

BF16 = {"bf16": {"enabled": True}}


def model(layers: int = 3) -> PreTrainedModel:
    config = LlamaConfig(
        hidden_size=64, num_attention_heads=4, intermediate_size=128, vocab_size=500, num_hidden_layers=layers
    )
    return structure(config, auto_class("CausalLM"))


def batch(length: int = 64) -> dict[str, torch.Tensor]:
    ids = torch.zeros(2, length, dtype=torch.long)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "positions": torch.arange(2 * length),
        "targets": torch.zeros(2 * length, dtype=torch.long),
    }


def predicted(zero: dict[str, Any], ranks: int = 1, *, on_cpu: bool = False, **more: Any) -> Memory:
    return memory(TokenLoss(model()), batch(), {"zero_optimization": zero, **more}, ranks, on_cpu=on_cpu)


PARAMETERS = sum(parameter.numel() for parameter in model().parameters())


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_every_stage_shares_out_moments_and_fp32_weights(stage: int) -> None:
    alone, four = (predicted({"stage": stage}, ranks, **BF16).optimizer for ranks in (1, 4))
    assert alone == pytest.approx(12 * PARAMETERS, rel=1e-3)
    assert four == pytest.approx(3 * PARAMETERS, rel=1e-2)


@pytest.mark.parametrize("precision", [{}, BF16])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_one_rank_takes_at_every_stage_what_it_takes_without(stage: int, precision: dict[str, Any]) -> None:
    assert predicted({"stage": stage}, **precision) == predicted({"stage": 0}, **precision)


def test_fp32_without_zero_has_no_second_weights() -> None:
    assert predicted({"stage": 0}).optimizer == 8 * PARAMETERS
    assert predicted({"stage": 0}, ranks=4).optimizer == 8 * PARAMETERS


def test_the_parts_make_up_the_device_on_a_cpu() -> None:
    found = predicted({"stage": 2}, on_cpu=True)
    assert sum(getattr(found, part) for part in PARTS) == found.device == found.host
    assert found.nvme == 0


def test_offload_moves_the_optimizer_to_the_host_or_to_nvme() -> None:
    here = predicted({"stage": 3}, 2, **BF16)
    host = predicted({"stage": 3, "offload_optimizer": {"device": "cpu"}}, 2, **BF16)
    nvme = predicted({"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": "/nvme"}}, 2, **BF16)
    assert here.host == here.nvme == 0
    assert host.host >= 6 * PARAMETERS and host.device < here.device
    assert nvme.nvme >= 6 * PARAMETERS and nvme.device < here.device


@pytest.mark.parametrize("stage", [2, 3])
def test_a_teacher_that_answers_before_training_lies_beside_a_student_whose_optimizer_takes_less(stage: int) -> None:
    student = get_peft_model(model(), LoraConfig(r=2, target_modules=["q_proj"]))
    objective, ds_config = (
        TokenLoss(student),
        {"zero_optimization": {"stage": stage, "reduce_bucket_size": 1000}, **BF16},
    )
    alone, taught, large = (
        memory(objective, batch(8), ds_config, 2, on_cpu=False, asked=asked)
        for asked in (0, PARAMETERS, 10 * PARAMETERS)
    )
    assert alone.phase != "teaching" and alone.device <= taught.device < large.device
    assert large.phase == "teaching" and large.optimizer == large.gradients == large.buckets == 0
    assert large.teacher == 2 * 10 * PARAMETERS // (2 if stage == 3 else 1)
    whole, asked = (
        memory(TokenLoss(model()), batch(8), ds_config, 2, on_cpu=False, asked=n * PARAMETERS) for n in (0, 1)
    )
    assert whole == asked


def test_what_is_on_nvme_takes_pinned_buffers_and_what_is_to_stay_in_the_hosts_memory() -> None:
    nvme = {"device": "nvme", "nvme_path": "/nvme"}
    own, largest = (of(-(-p.numel() // 2) for p in model().parameters()) for of in (sum, max))

    def host(parameters: dict[str, int], states: dict[str, int], **more: int) -> Memory:
        sections = {"offload_param": {**nvme, **parameters}, "offload_optimizer": {**nvme, **states}}
        return predicted({"stage": 3, **sections, **more}, 2, **BF16)

    least = host({"buffer_count": 1, "buffer_size": largest, "max_in_cpu": 0}, {"buffer_count": 4})
    assert host(
        {"buffer_count": 3, "buffer_size": largest, "max_in_cpu": 0}, {"buffer_count": 4}
    ).host - least.host == (2 * 2 * largest)
    assert host({}, {"buffer_count": 4}).host - least.host >= 2 * (5 * 100_000_000 - largest)
    kept = host({"buffer_count": 1, "buffer_size": largest, "max_in_cpu": 1000}, {"buffer_count": 4})
    assert kept.host - least.host == 2 * 1000 and kept.device == least.device
    fewer = host({"buffer_count": 1, "buffer_size": largest, "max_in_cpu": 0}, {"buffer_count": 3})
    matrices = sum(-(-p.numel() // 2) for p in model().parameters() if p.dim() > 1)  # the optimizer's first group
    assert least.host - fewer.host == 4 * matrices
    assert least.host > 2 * (own + largest)


def test_sub_groups_end_with_the_tensor_that_fills_them() -> None:
    assert largest_sub_group([[3, 4, 5, 1], [2]], least=6) == 7
    assert largest_sub_group([[3, 4, 5, 1], [2]], least=100) == 13
    assert largest_sub_group([[30], [2]], least=6) == 30


def test_frozen_weights_have_neither_gradients_nor_moments() -> None:
    student = get_peft_model(model(), LoraConfig(r=2, target_modules=["q_proj"]))
    trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
    found = memory(TokenLoss(student), batch(), {"zero_optimization": {"stage": 2}}, 2, on_cpu=True)
    assert found.optimizer == 12 * trained // 2
    assert found.weights >= 4 * (PARAMETERS + trained)


def test_a_teacher_has_weights_alone() -> None:
    objective = TokenDistillation(model(), TokenTeacher(model(), None), alpha=0.5, beta=0.0, temperature=1.0)
    held = steady(Sizes.of(objective), Zero.of({"zero_optimization": {"stage": 1}}, 2, True, False))
    assert held.device["teacher"] == 4 * PARAMETERS
    assert held.device["optimizer"] == 12 * PARAMETERS // 2


def test_layers_that_compute_again_take_less_and_the_model_forgets_it() -> None:
    objective = TokenLoss(model(layers=6))
    plain = traced(objective, batch(256), {}, on_cpu=True)
    again = traced(objective, batch(256), {"activation_checkpointing": {}}, on_cpu=True)
    assert again.saved < 0.5 * plain.saved and again.flops > 1.2 * plain.flops
    assert traced(objective, batch(256), {}, on_cpu=True).saved == plain.saved


def test_inputs_kept_on_the_host_are_the_hosts() -> None:
    offloaded = {"activation_checkpointing": {"cpu_checkpointing": True}}
    layers, states = 3, 4 * 2 * 64 * 64
    found = predicted({"stage": 2}, **offloaded)
    assert found.host == pytest.approx(layers * states, rel=0.5)
    assert (
        predicted({"stage": 2}, on_cpu=True, **offloaded).host
        == predicted({"stage": 2}, on_cpu=True, **offloaded).device
    )


def test_zero_3_gathers_a_layer_at_a_time_where_nothing_is_to_be_kept() -> None:
    objective = TokenLoss(model())
    sizes, found = Sizes.of(objective), traced(objective, batch(), {}, on_cpu=False)
    nothing = {"param_persistence_threshold": 0, "max_live_parameters": 0, "max_reuse_distance": 0}
    frugal = {"stage": 3, "prefetch_bucket_size": 0, **nothing}

    def most(zero: dict[str, Any], ranks: int = 2) -> int:
        return int(gathered(sizes, Zero.of({"zero_optimization": zero}, ranks, False, False), found).sum(1).max())

    largest = max(sizes.trained.values())
    assert most({"stage": 3, **nothing, "max_live_parameters": 10**9, "max_reuse_distance": 10**9}) >= 4 * PARAMETERS
    assert 4 * largest <= most(frugal) < 2 * 4 * PARAMETERS
    assert most(frugal) < most({"stage": 3, "param_persistence_threshold": 0})
    assert most(frugal, ranks=1) == most({"stage": 2}) == 0


def followed(*uses: tuple[str, ...]) -> Trace:
    """Modules that compute with these parameters, one a moment, and hold nothing."""
    nothing = np.zeros((len(uses), 4), dtype=np.int64)
    steps = tuple(Use(moment, names) for moment, names in enumerate(uses))
    return Trace(nothing, nothing[:, 0], len(uses), (), steps, 0, frozenset())


@pytest.mark.parametrize(
    ("prefetch", "on_cpu", "most"),
    [
        # alone: each stays where it arrives, while it is used
        (0, False, [100, 10, 30, 30]),
        # b and c come together while a computes, and are there twice until c, the last of them, is needed
        (30, False, [100 + 40, 40 + 40, 30 + 40, 30]),
        (200, False, [140 + 140, 40 + 140, 30 + 140, 30]),
        # gloo has what arrives once more: a, which comes alone, before it is used
        (30, True, [100 + 100, 40 + 40, 30 + 40, 30]),
        (200, True, [140 + 140, 40 + 140, 30 + 140, 30]),
    ],
)
def test_what_is_fetched_together_is_there_twice_until_the_last_of_it_is_used(prefetch, on_cpu, most) -> None:
    sizes = Sizes({"a": 100, "b": 10, "c": 30}, {}, {}, frozenset("abc"), frozenset())
    of_zero_3 = {"stage": 3, "prefetch_bucket_size": prefetch, "param_persistence_threshold": 0}
    zero = Zero.of({"zero_optimization": {**of_zero_3, "max_reuse_distance": 0}}, 2, on_cpu, False)
    assert (gathered(sizes, zero, followed(("a",), ("b",), ("c",)))[:, 0] / 4).tolist() == most


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_checkpoint_is_a_copy_of_weights_and_moments_in_host_memory(stage: int) -> None:
    ds_config = {"zero_optimization": {"stage": stage}, **BF16}
    objective, ranks = TokenLoss(model()), 4
    for on_cpu in (False, True):
        without, found = (memory(objective, batch(), ds_config, ranks, on_cpu=on_cpu, saves=s) for s in (False, True))
        assert found.host - without.host == pytest.approx(12 * PARAMETERS / ranks, rel=1e-2)
        assert found.device - without.device == (found.host - without.host if on_cpu else 0)


@pytest.mark.parametrize(("stage", "kept"), [(2, 0), (3, 4 * PARAMETERS)])
def test_only_the_bucket_of_zero_3_stays_for_evaluation(stage: int, kept: int) -> None:
    objective, zero = TokenLoss(model()), {"zero_optimization": {"stage": stage}}
    found = [traced(objective, batch(), zero, on_cpu=True, training=training) for training in (True, False)]
    all_phases = phases(Sizes.of(objective), Zero.of(zero, 2, True, False), *found)
    assert all_phases["evaluation"].device["buckets"] == kept


def test_parts_of_zero_1_and_2_are_ranges_of_each_group() -> None:
    sizes = Sizes({"a": 6, "b": 4, "c": 2}, {}, {}, frozenset("ab"), frozenset())
    assert in_partition(sizes, 1) == {"a", "b", "c"}
    assert in_partition(sizes, 2) == {"a", "b", "c"}  # the second rank: the end of a, all of b, half of c


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 8])
def test_the_rank_with_most_is_found_among_all_of_them(ranks: int) -> None:
    sizes = Sizes({f"p{i}": 1 + (7 * i) % 11 for i in range(9)}, {}, {}, frozenset({"p1", "p4", "p8"}), frozenset())
    parts: list[set[str]] = []
    for rank in range(ranks):
        parts.append(set())
        for group in sizes.groups():
            elements = [name for name, n in group.items() for _ in range(n)]
            part = -(-len(elements) // ranks)
            parts[-1] |= set(elements[rank * part : (rank + 1) * part])
    assert in_partition(sizes, ranks) == max(parts, key=lambda part: sum(sizes.trained[name] for name in part))


def test_settings_are_deepspeeds_with_its_defaults() -> None:
    zero = Zero.of({"zero_optimization": {"stage": 3, "stage3_prefetch_bucket_size": 7}, **BF16}, 8, False, False)
    assert (zero.size, zero.summed, zero.prefetch, zero.reduce_bucket) == (2, 2, 7, 500_000_000)


def test_products_in_half_precision_leave_their_compiled_code_on_a_cpu_once_for_each_shape() -> None:
    shapes = [traced(TokenLoss(model(layers)), batch(), BF16, on_cpu=True).half_products for layers in (3, 5)]
    assert shapes[0] == shapes[1] != frozenset()
    assert traced(TokenLoss(model()), batch(), {}, on_cpu=True).half_products == frozenset()
    half, full = (
        memory(
            TokenLoss(model()), batch(), {"zero_optimization": {"stage": 2}, **more}, 1, on_cpu=True, gives_back=True
        ).process
        for more in (BF16, {})
    )
    assert half - full == len(shapes[0]) * 2 * 256 * 1024
