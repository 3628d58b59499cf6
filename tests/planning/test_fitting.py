"""The largest micro-batch that fits, against all of them tried one by one."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from recyclable.planning import fitting
from recyclable.planning.devices import by_name, size
from recyclable.planning.fitting import Fitter
from recyclable.planning.time import Fleet


@pytest.fixture
def tries(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Memory of 10 + 3 rows, from 8 rows on 5 for each; notes what was traced."""
    traced: list[int] = []

    def taken(_: object, rows: int, *__: object, **___: object) -> SimpleNamespace:
        return SimpleNamespace(device=10 + 3 * rows + 2 * max(0, rows - 8), host=0, nvme=0)

    monkeypatch.setattr(fitting, "memory", taken)
    monkeypatch.setattr(fitting, "traced", lambda _, rows, *__: traced.append(rows) or rows)
    return traced


@pytest.mark.parametrize("share", [1, 7, 12, 64, 96])
@pytest.mark.parametrize("room", [5, 14, 20, 35, 60, 100, 400, 10_000])
def test_it_divides_the_share_fits_and_no_larger_one_does(tries: list[int], share: int, room: int):
    device = SimpleNamespace(memory=room / (1 - fitting.MARGIN), on_cpu=True)
    fleet = SimpleNamespace(device=device, ranks=1, local=1, host_memory=0.0)
    found = Fitter(object(), lambda rows: rows, share, fleet).largest({})
    fitting_rows = [r for r in range(1, share + 1) if share % r == 0 and 10 + 3 * r + 2 * max(0, r - 8) <= room + 1e-9]
    assert found.rows == max(fitting_rows, default=1) and found.fits == bool(fitting_rows)
    assert len(tries) <= 6 and len(set(tries)) == len(tries)


def test_one_that_is_named_is_tried_alone(tries: list[int]):
    fleet = Fleet(by_name("l4"), 1)
    assert Fitter(object(), lambda rows: rows, 64, fleet).largest({"train_micro_batch_size_per_gpu": 16}).rows == 16
    assert Fitter(object(), lambda rows: rows, 64, fleet).largest({"gradient_accumulation_steps": 2}).rows == 32
    assert tries == [16, 32]


def test_sizes_as_people_write_them():
    assert [size(text, "x") for text in ("80GB", "1.5 TB", "16GiB", "512m", "1000")] == [
        80e9,
        1.5e12,
        2**34,
        5.12e8,
        1000,
    ]
