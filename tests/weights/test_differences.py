"""What is done to differences on the way to a base: the same for every range, and what plain tensors give."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recyclable.errors import InputError
from recyclable.weights import algebra
from recyclable.weights.differences import Aligned, Dare, RandomSigns, Scaled, Ties, Total, require_alike
from recyclable.weights.digest import in_threads


class Plain:
    """Differences in memory."""

    def __init__(self, seed: int, rows: int = 40, columns: int = 7) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.tensors = {"words": torch.randn(rows, columns, generator=draw), "bias": torch.randn(5, generator=draw)}
        self.names = sorted(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        return self.tensors[name].view(-1)[start:stop].clone()


A, B = Plain(1), Plain(2)


@given(st.data())
@settings(max_examples=30)
def test_rows_follow_their_tokens_in_every_range(data: st.DataObject) -> None:
    rows = np.array(data.draw(st.lists(st.integers(-1, 39), max_size=60)), np.int64)
    aligned = Aligned(A, frozenset({"words"}), rows)
    wanted = torch.stack([A.tensors["words"][r] if r >= 0 else torch.zeros(7) for r in rows] or [torch.zeros(0)])
    assert aligned.shape("words") == (len(rows), 7) and aligned.shape("bias") == (5,)
    assert torch.equal(aligned.read("words"), wanted.view(-1))
    cuts = sorted({0, 7 * len(rows), *data.draw(st.lists(st.integers(0, 7 * len(rows)), max_size=4))})
    parts = [aligned.read("words", a, b) for a, b in itertools.pairwise(cuts)]
    assert torch.equal(torch.cat([*parts, torch.zeros(0)]), wanted.view(-1))
    assert torch.equal(aligned.read("bias"), A.tensors["bias"])


@given(st.data())
@settings(max_examples=30)
def test_columns_follow_their_tokens_in_every_range(data: st.DataObject) -> None:
    columns = np.array(data.draw(st.lists(st.integers(-1, 6), min_size=1, max_size=12)), np.int64)
    aligned = Aligned(A, frozenset(), columns, by_column=frozenset({"words"}))
    height = A.shape("words")[0]
    wanted = torch.stack([A.tensors["words"][:, c] if c >= 0 else torch.zeros(height) for c in columns], 1)
    assert aligned.shape("words") == wanted.shape and torch.equal(aligned.read("bias"), A.tensors["bias"])
    size = wanted.numel()
    cuts = sorted({0, size, *data.draw(st.lists(st.integers(0, size), max_size=4))})
    parts = [aligned.read("words", a, b) for a, b in itertools.pairwise(cuts)]
    assert torch.equal(torch.cat(parts), wanted.reshape(-1)) and torch.equal(aligned.read("words"), wanted.reshape(-1))


@pytest.mark.parametrize(
    ("changed", "wanted"),
    [
        (Total([A, B]), lambda n: A.tensors[n] + B.tensors[n]),
        (Scaled(A, {"words": 0.3}), lambda n: A.tensors[n] * (0.3 if n == "words" else 1)),
        (Scaled(A, {"words": 0.0, "bias": 0.3}), lambda n: A.tensors[n] * 0.3 * (n != "words")),
        (Dare(A, 0.5, 3), lambda n: algebra.dare(A.tensors[n].view(-1), 0.5, 3, n)),
        (
            RandomSigns(A, ["words"], 3),
            lambda n: algebra.random_signs(A.tensors[n].view(-1), 3, n) if n == "words" else A.tensors[n],
        ),
    ],
)
def test_elementwise_changes(changed, wanted) -> None:
    for name in changed.names:
        flat = wanted(name).view(-1)
        assert torch.allclose(changed.read(name), flat) and torch.allclose(changed.read(name, 2, 4), flat[2:4])


def test_ties_prunes_each_tensor_by_its_own_magnitudes() -> None:
    changed = Ties([A, B], 0.2)
    for name in changed.names:
        pair = [plain.tensors[name].view(-1) for plain in (A, B)]
        thresholds = [float(d.abs().sort(descending=True).values[-(-len(d) // 5) - 1]) for d in pair]
        assert torch.allclose(changed.read(name), algebra.ties(pair, thresholds))
        assert torch.allclose(changed.read(name, 1, 3), changed.read(name)[1:3])


def test_differences_of_other_shapes_are_not_summed() -> None:
    with pytest.raises(InputError, match=r"second: words is \(30, 7\), in first \(40, 7\)"):
        require_alike([A, Plain(3, rows=30)], ["first", "second"])
    other = Plain(4)
    other.names = ["words"]
    with pytest.raises(InputError, match="second: cannot be summed with first: bias is in only one"):
        require_alike([A, other], ["first", "second"])


def test_threads_that_prune_one_tensor_find_its_threshold_together(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []

    def slow(*arguments):
        found.append(arguments)
        time.sleep(0.05)
        return magnitude_threshold(*arguments)

    magnitude_threshold = algebra.magnitude_threshold
    monkeypatch.setattr(algebra, "magnitude_threshold", slow)
    ties = Ties([A, B], 0.3)
    parts = in_threads(lambda row: ties.read("words", 7 * row, 7 * row + 7), range(40), threads=4)
    assert len(found) == len(ties.several)
    torch.testing.assert_close(torch.cat(parts), ties.read("words"), rtol=0, atol=0)
