"""A trace without memory finds what a real forward and backward hold, and leaves the objective as it was."""

from __future__ import annotations

import math
from unittest.mock import patch

import numpy as np
import pytest
import torch
from transformers import BertConfig, LlamaConfig, MixtralConfig, PreTrainedModel

from recyclable.architectures import read_tokens
from recyclable.architectures.attention import Machine, set_attention
from recyclable.architectures.last_layer import narrow
from recyclable.architectures.read_tokens import read_only
from recyclable.kernels import chunked, rows, tiling
from recyclable.models.build import auto_class, structure
from recyclable.objectives.interpolation import Places
from recyclable.objectives.token_distillation import TokenDistillation, TokenTeacher
from recyclable.objectives.token_interpolation import TokenInterpolation
from recyclable.objectives.token_loss import TokenLoss
from recyclable.planning import trace as tracing
from recyclable.planning.trace import HOST, LOGITS, REST, TEACHER, Untraceable, trace

ROWS, LENGTH = 3, 32
SMALL = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 100}


def decoder(layers: int = 2) -> PreTrainedModel:
    return structure(LlamaConfig(num_hidden_layers=layers, **SMALL), auto_class("CausalLM"))


def encoder(layers: int = 2) -> PreTrainedModel:
    return structure(BertConfig(num_hidden_layers=layers, **SMALL), auto_class("MaskedLM"))


def batch(told: int = ROWS * LENGTH) -> dict[str, torch.Tensor]:
    ids = torch.arange(ROWS * LENGTH).view(ROWS, LENGTH) % 90
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "positions": torch.arange(told),
        "targets": torch.zeros(told, dtype=torch.long),
    }


def saved_by_autograd(model: PreTrainedModel) -> int:
    """Bytes of what autograd saves of a real forward of which one state is read, each storage once; the weights left
    out."""
    model = type(model)(model.config)
    narrow(model)
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    found: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        found[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    inputs = {name: batch()[name] for name in ("input_ids", "attention_mask")}
    model.train()
    only = read_only(torch.arange(1), ROWS, LENGTH)
    unseen = patch.object(read_tokens, "_padded", lambda *_: None)  # a plan does not know which rows are read
    with unseen, only, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        states = model.base_model(**inputs, **({"use_cache": False} if model.config.model_type == "llama" else {}))
    assert states is not None
    return sum(storage.nbytes() for key, storage in found.items() if key not in weights)


@pytest.mark.parametrize("make", [decoder, encoder])
def test_what_is_saved_for_the_backward_pass_is_what_autograd_saves(make) -> None:  # type: ignore[no-untyped-def]
    few = trace(TokenLoss(make()), batch(told=1))
    assert few.saved == pytest.approx(saved_by_autograd(make()), rel=0.12)


def test_each_like_layer_takes_the_same() -> None:
    two, three, six = (trace(TokenLoss(decoder(layers)), batch()) for layers in (2, 3, 6))
    for of in (lambda t: t.saved, lambda t: t.peak(0), lambda t: t.flops, lambda t: int(t.done[-1])):
        assert of(six) == of(three) + 3 * (of(three) - of(two))


def test_flops_are_those_of_three_products_a_weight_and_token() -> None:
    objective = TokenLoss(decoder())
    weights = sum(p.numel() for n, p in objective.named_parameters() if p.dim() == 2 and "embed" not in n)
    attention = 2 * (2 * 2 * ROWS * LENGTH * LENGTH * SMALL["hidden_size"])  # layers x (two products)
    assert trace(objective, batch()).flops == pytest.approx(6 * weights * ROWS * LENGTH + 3.5 * attention, rel=0.01)


def test_a_last_layer_that_is_read_at_few_tokens_takes_less_to_compute() -> None:
    objective = TokenLoss(encoder())
    (last,) = [n for n, _ in objective.named_parameters() if n.endswith("layer.1.output.dense.weight")]
    behind = last.removesuffix("output.dense.weight")
    weights = sum(p.numel() for n, p in objective.named_parameters() if n.startswith(behind) and p.dim() == 2)
    weights -= 2 * SMALL["hidden_size"] ** 2  # of keys and values
    few, most = ROWS * LENGTH // 2, ROWS * LENGTH // 2 + 1
    spared = trace(objective, batch(told=most)).flops - trace(objective, batch(told=few)).flops
    head = SMALL["hidden_size"] * (SMALL["hidden_size"] + SMALL["vocab_size"])
    assert spared == 6 * (weights * (ROWS * LENGTH - few) + head)


def test_gradients_come_once_each_and_all_is_given_back_at_the_end() -> None:
    objective = TokenLoss(decoder())
    found = trace(objective, batch())
    trained = dict(objective.named_parameters())
    assert {name for name, _ in found.order} == set(trained) and len(found.order) == len(trained)
    assert found.done[-1] == 4 * sum(p.numel() for p in trained.values())
    assert found.held[-1].sum() < 100  # a scalar or two
    assert found.peak(1) >= found.peak(0)


def test_the_objective_stays_as_it_was() -> None:
    objective = TokenLoss(decoder())
    objective.student.train(False)
    before = {name: id(parameter) for name, parameter in objective.named_parameters()}
    trace(objective, batch())
    assert {name: id(parameter) for name, parameter in objective.named_parameters()} == before
    assert all(parameter.is_meta and parameter.grad is None for parameter in objective.parameters())
    assert not objective.student.training
    assert "forward" not in vars(objective.over_vocabulary)


def test_a_teacher_and_logits_are_told_apart() -> None:
    alone = trace(TokenLoss(encoder()), batch())
    objective = TokenDistillation(
        encoder(), TokenTeacher(encoder(), None), alpha=0.5, beta=0.0, temperature=1.0, term="mlm"
    )
    taught = trace(objective, batch())
    assert alone.held[:, TEACHER].max() == 0 and taught.held[:, TEACHER].max() > 0
    assert alone.held[:, LOGITS].max() >= 4 * ROWS * LENGTH * SMALL["vocab_size"]
    assert taught.held[:, LOGITS].max() > alone.held[:, LOGITS].max()
    assert taught.held[:, REST].max() >= alone.held[:, REST].max() and taught.held[:, HOST].max() == 0


def test_half_the_precision_takes_about_half() -> None:
    full, half = (trace(TokenLoss(decoder()), batch(), precision=p) for p in (torch.float32, torch.bfloat16))
    assert full.done[-1] == 2 * half.done[-1]
    assert half.saved < 0.75 * full.saved


def test_an_evaluation_keeps_nothing() -> None:
    found = trace(TokenLoss(decoder()), batch(), training=False)
    assert not found.order and found.done.max() == 0
    assert found.peak(0) < trace(TokenLoss(decoder()), batch()).peak(0)


def test_a_path_of_weights_can_be_traced_and_is_still_one_afterwards() -> None:
    objective = TokenInterpolation(
        encoder(),
        TokenTeacher(encoder(), None),
        places=Places(points=(0.5,)),
        share=0.5,
        alphas=(0.5, 0.5),
        betas=(0.0, 0.0),
        temperature=1.0,
    )
    mixing = vars(objective.at_points)["forward"]
    found = trace(objective, batch())
    assert found.done[-1] == 4 * sum(p.numel() for p in objective.student.parameters())
    assert vars(objective.at_points)["forward"] is mixing


def test_a_tied_embeddings_two_gradients_are_added_in_place() -> None:
    tied, untied = (
        structure(
            LlamaConfig(num_hidden_layers=1, **{**SMALL, "vocab_size": 20_000}, tie_word_embeddings=tie),
            auto_class("CausalLM"),
        )
        for tie in (True, False)
    )
    embedding = 4 * 20_000 * SMALL["hidden_size"]
    found = trace(TokenLoss(tied), batch())
    assert 2 * embedding <= found.held[found.forward :].sum(1).max() < 3 * embedding
    assert found.done[-1] == trace(TokenLoss(untied), batch()).done[-1] - embedding


@pytest.mark.parametrize("taught", [False, True])
def test_few_of_a_losss_tiles_tell_of_all(monkeypatch: pytest.MonkeyPatch, taught: bool) -> None:
    monkeypatch.setattr(chunked, "CPU_TOKENS", 10)  # 96 tokens in ten chunks
    monkeypatch.setattr(chunked, "CPU_LOGITS", 1)
    monkeypatch.setattr(chunked, "VOCABULARY_BLOCK", 12)
    monkeypatch.setattr(rows, "BLOCK", 200)
    monkeypatch.setattr(rows, "SHARED_BLOCK", 200)

    def found() -> tracing.Trace:
        if not taught:
            return trace(TokenLoss(decoder()), batch(), precision=torch.bfloat16)
        teacher = TokenTeacher(encoder(), None)
        return trace(TokenDistillation(encoder(), teacher, alpha=0.5, beta=0.0, temperature=2.0, term="mlm"), batch())

    few = found()
    monkeypatch.setattr(tracing, "_few", lambda _: tiling.tiles)
    everything = found()
    assert len(few.held) < len(everything.held) / 2 and few.flops == everything.flops
    assert np.array_equal(few.held.max(0), everything.held.max(0)) and few.peak() == everything.peak()
    assert few.saved == everything.saved and few.done[-1] == everything.done[-1]
    assert np.array_equal(np.unique(few.held, axis=0), np.unique(everything.held, axis=0))


def test_a_model_that_looks_at_a_value_is_named_so_and_stays_as_it_was() -> None:
    class Looks(TokenLoss):
        def sums(self, batch):  # type: ignore[no-untyped-def]
            found = super().sums(batch)
            return found if next(iter(found.values())).item() > 0 else {}

    objective = Looks(decoder())
    objective.train(False)
    with pytest.raises(Untraceable, match="DataDependent"):
        trace(objective, batch())
    assert not objective.student.training and "forward" not in vars(objective.over_vocabulary)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_experts_flops_are_those_of_the_ones_that_a_token_asks(precision: torch.dtype) -> None:
    sizes = {**SMALL, "num_hidden_layers": 1, "num_key_value_heads": 4, "num_experts_per_tok": 2}
    objectives = [
        TokenLoss(structure(MixtralConfig(num_local_experts=n, **sizes), auto_class("CausalLM"))) for n in (2, 4)
    ]
    two, four = (trace(objective, batch(), precision=precision) for objective in objectives)
    shapes = {name: tuple(p.shape) for name, p in objectives[0].named_parameters()}
    experts = sum(math.prod(shape) for shape in shapes.values() if len(shape) == 3)
    dense = sum(math.prod(shape) for name, shape in shapes.items() if len(shape) == 2 and "embed" not in name)
    attention = 2 * 2 * ROWS * LENGTH * LENGTH * SMALL["hidden_size"]
    assert two.flops == pytest.approx(6 * (experts + dense) * ROWS * LENGTH + 3.5 * attention, rel=0.02)
    router = 6 * 2 * SMALL["hidden_size"] * ROWS * LENGTH
    assert four.flops - two.flops == router


def test_attention_in_bf16_is_written_out_on_a_cpu_alone_where_the_model_may():
    """Products of batches of matrices are attention's alone."""

    def probabilities(wanted: str | None, on_cpu: bool) -> bool:
        model = decoder()
        set_attention(model, wanted, True, Machine())
        found = trace(TokenLoss(model), batch(), precision=torch.bfloat16, on_cpu=on_cpu)
        return any("bmm" in name for name, _ in found.half_products)

    assert probabilities(None, on_cpu=True)
    assert not probabilities(None, on_cpu=False)
    assert not probabilities("sdpa", on_cpu=True)
