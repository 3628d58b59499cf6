"""Tensors that are put together without being made give, range by range, what PyTorch makes of the same functions."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from recyclable.weights.checkpoint_files import InMemory, Stored
from recyclable.weights.rearranged import Planned

Tensors = dict[str, torch.Tensor]
DRAW = torch.Generator().manual_seed(1)
HELD = {
    **{f"expert{i}": torch.randn(6, 8, generator=DRAW) for i in range(4)},
    "several": torch.randn(4, 10, 6, generator=DRAW).bfloat16(),
    "matrix": torch.randn(24, 5, generator=DRAW),
    "four": torch.randn(2, 3, 4, 5, generator=DRAW),
}


def experts(t: Tensors) -> list[torch.Tensor]:
    return [t[f"expert{i}"] for i in range(4)]


def turned_for_rope(t: Tensors) -> torch.Tensor:
    return t["matrix"].reshape(3, 4, 2, 5).transpose(1, 2).reshape(24, 5)


MADE: dict[str, Callable[[Tensors], torch.Tensor]] = {
    "stacked": lambda t: torch.stack(experts(t)),
    "stacked behind": lambda t: torch.stack(experts(t), dim=-1),
    "stacked, then joined": lambda t: torch.cat([torch.stack(experts(t)[:2]), torch.stack(experts(t)[2:])], 1),
    "joined along the last dimension": lambda t: torch.cat(experts(t), -1),
    "a chunk": lambda t: torch.chunk(t["several"], 3, 1)[2],
    "a split": lambda t: torch.split(t["matrix"], [3, 20, 1])[1],
    "one of a stack": lambda t: torch.stack(experts(t), 1)[:, 2],
    "a slice": lambda t: t["several"][1:3, 2:-1],
    "unbound and joined": lambda t: torch.cat(torch.unbind(t["several"], 1), 0),
    "transposed": lambda t: t["several"].transpose(1, 2).contiguous(),
    "a transposed matrix": lambda t: t["matrix"].T,
    "permuted": lambda t: t["four"].permute(3, 1, 0, 2).contiguous(),
    "permuted but for the last": lambda t: t["four"].permute(2, 0, 1, 3).flatten(1, 2),
    "turned for RoPE": turned_for_rope,
    "chunks squeezed and stacked again": lambda t: torch.stack([c.squeeze(0) for c in t["several"].chunk(4)], 2),
}


@pytest.mark.parametrize("name", MADE)
def test_every_range_of_a_rearrangement_has_pytorch_s_own_elements(name: str) -> None:
    source = InMemory(HELD)
    with torch.no_grad():
        planned = MADE[name]({held: Planned.stored(source, held) for held in HELD})
    want = MADE[name](HELD)
    assert isinstance(planned, Planned) and (planned.shape, planned.dtype) == (want.shape, want.dtype)
    flat, size = want.reshape(-1), want.numel()
    for start in range(0, size, 7):
        for stop in {min(start + length, size) for length in (1, 5, 33, size)}:
            assert torch.equal(planned.plan.read(start, stop), flat[start:stop]), (start, stop)


class Counting(InMemory):
    """Counts the elements that are read."""

    def __init__(self, tensors: Tensors) -> None:
        super().__init__(tensors)
        self.read_elements = 0

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        found = super().read(name, start, stop)
        self.read_elements += found.numel()
        return found


def test_no_more_is_read_than_the_range_but_for_a_row_beside_it_where_dimensions_are_turned() -> None:
    for name, make in MADE.items():
        source = Counting(HELD)
        with torch.no_grad():
            planned = make({held: Planned.stored(source, held) for held in HELD})
        size, turned = planned.numel(), "permuted" in name or "transposed" in name or "turned" in name
        for rank in range(4):
            planned.plan.read(size * rank // 4, size * (rank + 1) // 4)
        assert source.read_elements == size or (turned and source.read_elements <= 2 * size), name


NOT_REARRANGEMENTS: list[tuple[Callable[[Tensors], torch.Tensor], str]] = [
    (lambda t: t["matrix"] * 2, "is no rearrangement"),
    (lambda t: t["matrix"][::2], "is no rearrangement"),
    (lambda t: torch.stack([t["expert0"], t["half"]]), r"of torch.bfloat16 and torch.float32 together"),
]


@pytest.mark.parametrize(("make", "said"), NOT_REARRANGEMENTS)
def test_what_is_no_rearrangement_is_refused(make: Callable[[Tensors], torch.Tensor], said: str) -> None:
    source = InMemory({**HELD, "half": HELD["expert1"].bfloat16()})
    with torch.no_grad(), pytest.raises(ValueError, match=said):
        make({name: Planned.stored(source, name) for name in source.names})


def test_a_planned_tensor_takes_no_memory() -> None:
    class Huge(InMemory):
        def stored(self, name: str) -> Stored:
            return Stored(torch.float32, (1 << 20, 1 << 20))

    with torch.no_grad():
        made = torch.stack([Planned.stored(Huge({}), str(i)) for i in range(8)]).transpose(1, 2)
    assert made.shape == (8, 1 << 20, 1 << 20)
