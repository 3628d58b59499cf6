"""Compiled layers compute what they do without: one graph for all of a kind, whatever the length, recomputed or not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from transformers import RobertaConfig, RobertaForMaskedLM

from recyclable import distributed
from recyclable.architectures.compiling import compiled_layers, require_compiler
from recyclable.architectures.recomputing import recompute_layers
from recyclable.config.settings import TrainSettings
from recyclable.errors import InputError
from recyclable.objectives.token_loss import TokenLoss
from recyclable.training.engine import materialize

LENGTHS = (6, 9, 6, 12)
LAYERS = 3


def model() -> RobertaForMaskedLM:
    torch.manual_seed(5)
    sizes = {"vocab_size": 40, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return RobertaForMaskedLM(RobertaConfig(num_hidden_layers=LAYERS, max_position_embeddings=32, **sizes, **dropout))


def losses(trained: nn.Module) -> list[float]:
    """Of a few steps of gradient descent, each on texts of another length, one of them padded, of which other tokens
    are read."""
    objective, found = TokenLoss(trained), []
    for length in LENGTHS:
        ids = torch.randint(3, 40, (2, length), generator=torch.Generator().manual_seed(length))
        mask = torch.ones_like(ids)
        mask[0, length // 2 :] = 0
        positions = torch.arange(0, ids.numel(), length // 2)[: length // 3]
        batch = {"input_ids": ids, "attention_mask": mask, "positions": positions, "targets": ids.flatten()[positions]}
        loss = objective(batch)["task"]
        loss.backward()
        with torch.no_grad():
            for parameter in trained.parameters():
                if parameter.grad is not None:
                    parameter -= 0.1 * parameter.grad
                    parameter.grad = None
        found.append(loss.item())
    return found


@pytest.mark.parametrize("again", [False, True])
def test_layers_share_a_graph_and_train_as_without(again: bool) -> None:
    plain, own = model().train(), model().train()
    if again:
        recompute_layers(own)
    TokenLoss(own)  # whose last layer computes only what is read, by hooks that no compiler follows
    names = list(own.state_dict())
    torch._dynamo.reset()
    counters.clear()
    with compiled_layers(own, "eager"):
        found = losses(own)
        assert list(own.state_dict()) == names
    assert found == pytest.approx(losses(plain), rel=1e-5)
    # The first length and any other, of all layers but the last: a fraction of what each by itself would take.
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]


@pytest.mark.parametrize("again", [False, True])
def test_evaluation_is_compiled_as_well(again: bool) -> None:
    plain, own = model().eval(), model().eval()
    if again:
        recompute_layers(own)
    torch._dynamo.reset()
    counters.clear()
    with compiled_layers(own, "eager"), torch.no_grad():
        for length in LENGTHS:
            ids = torch.arange(3, 3 + length)[None]
            assert torch.allclose(own(input_ids=ids).logits, plain(input_ids=ids).logits, atol=1e-6)
    assert counters["stats"]["unique_graphs"] == 2  # the first length and any other
    assert not counters["graph_break"]


def test_a_model_is_as_it_was_afterwards() -> None:
    own = model().train()
    recompute_layers(own)
    before = [vars(module).get("_gradient_checkpointing_func") for module in own.modules()]
    with compiled_layers(own, "eager"):
        pass
    assert [vars(module).get("_gradient_checkpointing_func") for module in own.modules()] == before
    assert all(module._compiled_call_impl is None for module in own.modules())


def test_a_model_without_layers_is_refused() -> None:
    with (
        pytest.raises(InputError, match=r"^torch_compile: is true, but Linear has no stack of layers"),
        compiled_layers(nn.Linear(2, 2)),
    ):
        pass


def test_a_machine_without_a_compiler_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> str:
        raise RuntimeError("No working C++ compiler found in ...")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", none)
    with pytest.raises(InputError, match=r"^torch_compile: is true, but there is no C\+\+ compiler .*: install it"):
        require_compiler()


def test_zero_3_on_several_ranks_is_refused_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    settings = TrainSettings(out=tmp_path / "out", max_steps=1, learning_rate=1e-3, torch_compile=True)
    with pytest.raises(InputError, match=r"^torch_compile: is true, but ZeRO-3 .* ZeRO stage 0 to 2$"):
        materialize(TokenLoss(model()), settings, {"zero_optimization": {"stage": 3}})
    assert not settings.out.exists()


def test_a_path_of_weights_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    along = TokenLoss(model())
    along.passes = lambda step: ({}, {})  # type: ignore[method-assign]
    settings = TrainSettings(out=tmp_path / "out", max_steps=1, learning_rate=1e-3, torch_compile=True)
    with pytest.raises(InputError, match=r"^torch_compile: is true, but points of a path mix .*: expected false$"):
        materialize(along, settings, {})
