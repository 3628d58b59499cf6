"""Values are read by range, drawn in pieces as if they were drawn whole, and come to parameters in place."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn

from recyclable.weights import sources
from recyclable.weights.sources import Unread, drawn, fill, held, is_unread, read_into, seed_of, set_source


@pytest.mark.parametrize("numel", [5, 16, 17, 100, 128, 130, 150, 1000])
def test_pieces_of_a_draw_are_those_of_the_whole_draw(monkeypatch: pytest.MonkeyPatch, numel: int) -> None:
    monkeypatch.setattr(sources, "_DRAWN_TOGETHER", 64)
    whole = torch.empty(numel, 1).normal_(0, 0.3, generator=torch.Generator().manual_seed(seed_of(7, "a"))).view(-1)
    read = drawn(7, "a", (numel, 1), 0.3)
    for start in (0, 1, numel // 3, numel - 1):
        for stop in (start, start + 1, numel // 2, numel):
            assert torch.equal(read(start, max(start, stop)), whole[start : max(start, stop)])


def test_biases_are_drawn_as_zeros_and_norms_as_ones() -> None:
    assert drawn(1, "a.bias", (4,), 0.1)(1, 3).tolist() == [0, 0]
    assert drawn(1, "a.weight", (4,), 0.1)(1, 3).tolist() == [1, 1]


def test_ranges_are_read_once_each_and_cast_to_what_the_target_is(monkeypatch: pytest.MonkeyPatch) -> None:
    values, asked = torch.arange(3_000_000) / 7, []

    def read(start: int, stop: int) -> torch.Tensor:
        asked.append((start, stop))
        return values[start:stop]

    target = torch.zeros(2_500_000, dtype=torch.bfloat16)
    read_into([(target, read, 300_000)])
    assert torch.equal(target, values[300_000:2_800_000].bfloat16())
    covered = sorted(asked)
    assert covered[0][0] == 300_000 and covered[-1][1] == 2_800_000 and len(covered) > 2
    assert all(a[1] == b[0] for a, b in itertools.pairwise(covered))


def test_tied_and_frozen_parameters_stay_so_and_copies_have_values_of_their_own() -> None:
    values, model = torch.randn(3, 2), nn.ModuleDict({"a": nn.Linear(2, 3, bias=False), "b": nn.Linear(2, 3)})
    model["b"].weight = model["a"].weight.requires_grad_(False)
    parameter = model["a"].weight
    set_source(parameter, held(values))
    assert is_unread(model) and isinstance(parameter, Unread) and model["b"].weight is parameter
    other = copy.deepcopy(model)
    assert other["a"].weight is other["b"].weight
    fill(model, dtype=torch.bfloat16)
    assert not is_unread(model) and is_unread(other) and type(parameter) is nn.Parameter
    assert model["a"].weight is model["b"].weight is parameter and not parameter.requires_grad
    assert torch.equal(parameter, values.bfloat16()) and model["b"].bias.dtype == torch.float32
    assert torch.equal(fill(other)["b"].weight, values)


def test_an_error_while_reading_is_the_one_that_is_raised() -> None:
    def read(start: int, stop: int) -> torch.Tensor:
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        read_into([(torch.zeros(3), read, 0)])
