"""The loop's parts by themselves: schedule, order and shares of a step, masks, predictions on uneven sizes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from worlds import make_tokenizer

from recyclable.config.settings import TrainSettings
from recyclable.data.blocks import MaskedBlocks
from recyclable.data.examples import LabelledTexts
from recyclable.data.order import Order, share_of_step
from recyclable.data.split import Split
from recyclable.training import evaluation
from recyclable.training.evaluation import mean_losses, predict
from recyclable.training.optimizer import build_optimizer, learning_rate


def settings(**changed) -> TrainSettings:
    return TrainSettings(**{"out": Path("out"), "max_steps": 10, "learning_rate": 0.8, "warmup_steps": 4, **changed})


# ---- learning rate and optimizer ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheduler", "rates"),
    [
        ("constant", [0.2, 0.4, 0.6, 0.8, 0.8, 0.8, 0.8, 0.8, 0.8, 0.8]),
        ("linear", [0.2, 0.4, 0.6, 0.8, 0.8, 4 / 6, 3.2 / 6, 0.4, 1.6 / 6, 0.8 / 6]),
        ("cosine", [0.2, 0.4, 0.6, 0.8, 0.8, 0.746410, 0.6, 0.4, 0.2, 0.053590]),
    ],
)
def test_the_rate_warms_up_in_a_line_and_decays_towards_zero(scheduler, rates):
    found = [learning_rate(step, settings(lr_scheduler_type=scheduler)) for step in range(10)]
    assert found == pytest.approx(rates, abs=1e-6)


def test_without_warmup_the_first_step_has_the_full_rate_and_a_warmup_longer_than_the_run_never_reaches_it():
    assert learning_rate(0, settings(warmup_steps=0)) == 0.8
    assert learning_rate(9, settings(warmup_steps=20)) == pytest.approx(0.4)
    assert learning_rate(9, settings(warmup_steps=10)) == pytest.approx(0.8)


def test_biases_norms_and_frozen_weights_are_kept_out_of_weight_decay():
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2), torch.nn.Linear(2, 2))
    module[2].requires_grad_(False)
    decayed, rest = build_optimizer(module, settings(weight_decay=0.1)).param_groups
    assert decayed["weight_decay"] == 0.1 and decayed["params"] == [module[0].weight]
    assert rest["weight_decay"] == 0.0
    assert {id(p) for p in rest["params"]} == {id(module[0].bias), id(module[1].weight), id(module[1].bias)}


# ---- order and shares --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("examples", "batch"), [(10, 4), (12, 4), (3, 8), (1, 2), (7, 7)])
def test_every_example_comes_once_per_epoch_and_none_is_dropped_at_a_seam(examples, batch):
    order = Order(examples, batch, seed=1)
    stream = [item for step in range(examples * 3) for item in order.step(step)]
    assert all(len(order.step(step)) == batch for step in range(5))
    for epoch in range(3):
        part = stream[epoch * examples : (epoch + 1) * examples]
        assert sorted(part) == [(epoch, index) for index in range(examples)]


def test_epochs_and_seeds_are_shuffled_apart_and_any_step_can_be_asked_for_first():
    order = Order(50, 50, seed=1)
    assert [i for _, i in order.step(0)] != list(range(50))
    assert [i for _, i in order.step(0)] != [i for _, i in order.step(1)]
    assert order.step(0) != Order(50, 50, seed=2).step(0)
    fresh = Order(50, 50, seed=1)
    assert fresh.step(7) == [order.step(step) for step in range(8)][7]


@pytest.mark.parametrize("lengths", [None, np.arange(50)])
@pytest.mark.parametrize("steps", [0, 1, 3, 8, 1000])
def test_the_examples_that_a_run_uses_are_those_of_its_steps(lengths, steps):
    order = Order(50, 7, seed=1, lengths=lengths)
    assert order.used(steps) == sorted({index for step in range(min(steps, 20)) for _, index in order.step(step)})


@pytest.mark.parametrize(("world", "micro"), [(1, 24), (1, 6), (2, 12), (2, 3), (3, 4), (4, 6), (8, 1)])
def test_the_shares_of_all_ranks_are_the_step_itself(world, micro):
    items = Order(100, 24, seed=3).step(5)
    shares = [share_of_step(items, rank, world, micro) for rank in range(world)]
    assert {len(share) for share in shares} == {24 // world // micro}
    assert all(len(part) == micro for share in shares for part in share)
    assert Counter(item for share in shares for part in share for item in part) == Counter(items)
    # the k-th accumulation step of all ranks together is the k-th piece of the step
    joined = [item for k in range(len(shares[0])) for share in shares for item in share[k]]
    assert joined == items


# ---- masks -------------------------------------------------------------------------------------------------------


class Blocks:
    """Blocks [CLS] w ... w [SEP] of random words, as `pack` makes them."""

    seq_len = 64

    def __init__(self, count: int = 400) -> None:
        self.ids = np.random.default_rng(0).integers(5, 200, size=(count, self.seq_len))
        self.ids[:, 0], self.ids[:, -1] = 2, 3

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> np.ndarray:
        return self.ids[i].copy()


def masked(blocks: Blocks, indices: range | None = None, seed: int = 1) -> MaskedBlocks:
    return MaskedBlocks(blocks, make_tokenizer(), 0.15, seed, range(len(blocks)) if indices is None else indices)


def test_masks_follow_bert_and_spare_special_tokens():
    blocks = Blocks()
    batch = masked(blocks).batch([(0, row) for row in range(400)])
    original, shown = torch.from_numpy(blocks.ids).flatten(), batch["input_ids"].flatten()
    positions, targets = batch["positions"], batch["targets"]
    assert torch.equal(original[positions], targets)
    assert (targets >= 5).all(), "a special token was masked"
    assert len(positions) / (400 * 62) == pytest.approx(0.15, abs=0.01)
    untouched = torch.ones_like(shown, dtype=torch.bool)
    untouched[positions] = False
    assert torch.equal(shown[untouched], original[untouched])
    is_mask, is_same = shown[positions] == 4, shown[positions] == targets
    assert is_mask.float().mean().item() == pytest.approx(0.8, abs=0.02)
    assert is_same.float().mean().item() == pytest.approx(0.1, abs=0.02)
    others = shown[positions][~is_mask & ~is_same]
    assert len(others) / len(positions) == pytest.approx(0.1, abs=0.02)
    assert len(others.unique()) > 100, "replacements come from the whole vocabulary"
    assert torch.equal(batch["attention_mask"], torch.ones(400, 64, dtype=torch.long))


def test_masks_depend_on_seed_epoch_and_block_alone():
    blocks = Blocks()
    items = [(epoch, row) for epoch in (0, 1) for row in (5, 9)]
    whole, again = masked(blocks).batch(items), masked(blocks).batch(items)
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    positions = [masked(blocks).batch([item])["positions"].tolist() for item in items]
    assert len({tuple(p) for p in positions}) == 4, "each epoch and block has a draw of its own"
    assert masked(blocks, seed=2).batch(items[:1])["positions"].tolist() != positions[0]
    shifted = masked(blocks, range(5, 400)).batch([(0, 0)])  # the same block under another number
    assert shifted["positions"].tolist() == positions[0]


@pytest.mark.parametrize("sizes", [(12,), (6, 6), (3, 3, 3, 3), (1, 11), (5, 4, 3)])
def test_masks_are_the_same_however_a_step_is_split(sizes):
    examples, items = masked(Blocks()), [(2, row) for row in range(12)]
    whole, start = examples.batch(items), 0
    parts = []
    for size in sizes:
        parts.append((start, examples.batch(items[start : start + size])))
        start += size
    for name in ("input_ids", "targets"):
        assert torch.equal(torch.cat([part[name] for _, part in parts]), whole[name])
    assert torch.equal(torch.cat([part["positions"] + first * 64 for first, part in parts]), whole["positions"])


# ---- evaluation --------------------------------------------------------------------------------------------------


class Engine:
    """Predicts, for each text, its number of tokens and the sum of its ids, whatever the padding; counts calls."""

    device = "cpu"

    def __init__(self) -> None:
        self.calls, self.weights = 0, {"a": 1.0}

    @property
    def module(self) -> Engine:
        return self

    def __call__(self, batch: dict[str, torch.Tensor], predict: bool = False):
        self.calls += 1
        mask = batch["attention_mask"]
        both = torch.stack([mask.sum(1), (batch["input_ids"] * mask).sum(1)], dim=1).double()
        return both if predict else {"a": both[:, 1].sum()}

    def counts(self, batch: dict[str, torch.Tensor]) -> dict[str, int]:
        return {"a": int(batch["attention_mask"].sum())}


def texts(count: int) -> LabelledTexts:
    words = [" ".join(f"w{(7 * i + k) % 195}" for k in range(1 + (i * 5) % 17)) for i in range(count)]
    return LabelledTexts(Split(words, None, [0] * count), make_tokenizer(), 32)


def expected_of(examples: LabelledTexts) -> np.ndarray:
    rows = [examples.batch([(0, i)]) for i in range(len(examples))]
    return np.array([[int(r["attention_mask"].sum()), int(r["input_ids"].sum())] for r in rows])


class Ranks:
    """Lets one process play all ranks in turn: what they add up is kept and added at the last one's."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, world: int) -> None:
        self.world, self.rank, self.sent = world, 0, []
        monkeypatch.setattr(evaluation.distributed, "world_size", lambda: world)
        monkeypatch.setattr(evaluation.distributed, "rank", lambda: self.rank)
        monkeypatch.setattr(evaluation.distributed, "sum_over_ranks", self.add)

    def add(self, tensor: torch.Tensor) -> torch.Tensor:
        self.sent.append(tensor.clone())
        return torch.stack(self.sent).sum(0)

    def __iter__(self):
        for rank in range(self.world):
            self.rank = rank
            yield rank


@pytest.mark.parametrize("count", [1, 2, 5, 6, 7, 13])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_predictions_are_complete_and_in_order_for_any_size_and_number_of_ranks(monkeypatch, count, world, batch_size):
    examples, calls = texts(count), []
    for _ in (ranks := Ranks(monkeypatch, world)):
        engine = Engine()
        found = predict(engine, examples, batch_size)
        calls.append(engine.calls)
    assert len(ranks.sent) == (world if world > 1 else 0), "every rank sends its share once, one alone sends nothing"
    np.testing.assert_array_equal(found, expected_of(examples))
    assert len(set(calls)) == 1, "under ZeRO-3 a rank that runs fewer forward passes leaves the others waiting"


@pytest.mark.parametrize("count", [1, 5, 7])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_mean_losses_count_every_example_once(monkeypatch, count, world):
    examples, calls = texts(count), []
    for _ in Ranks(monkeypatch, world):
        engine = Engine()
        found = mean_losses(engine, examples, 2)
        calls.append(engine.calls)
    lengths, ids = expected_of(examples).T
    assert found == {"a": pytest.approx(ids.sum() / lengths.sum())}
    assert len(set(calls)) == 1


def test_the_mean_of_no_losses_is_none(monkeypatch):
    engine = Engine()
    monkeypatch.setattr(engine.module, "counts", lambda batch: {"a": 0}, raising=False)
    assert mean_losses(engine, texts(3), 2) == {"a": None}


def test_grouping_by_length_uses_every_example_once_per_epoch_and_leaves_less_to_pad() -> None:
    examples, batch = 96, 8
    lengths = np.random.default_rng(3).integers(5, 100, size=examples)
    plain, grouped = Order(examples, batch, seed=1), Order(examples, batch, seed=1, lengths=lengths)
    steps = [grouped.step(step) for step in range(examples // batch)]
    assert sorted(index for items in steps for _, index in items) == list(range(examples))

    def padded(order: Order) -> int:
        return sum(batch * max(lengths[index] for _, index in order.step(step)) for step in range(examples // batch))

    assert padded(grouped) < 1.2 * lengths.sum() < 0.8 * padded(plain)


def test_grouped_steps_depend_on_seed_and_step_alone() -> None:
    lengths = np.arange(50)
    order = Order(50, 7, seed=1, lengths=lengths)
    later_first = [order.step(step) for step in (30, 2, 30)]
    assert later_first == [Order(50, 7, seed=1, lengths=lengths).step(step) for step in (30, 2, 30)]
    assert order.step(2) != Order(50, 7, seed=2, lengths=lengths).step(2)


def test_long_and_short_steps_are_mixed() -> None:
    order = Order(400, 8, seed=1, lengths=np.arange(400))
    firsts = [order.step(step)[0][1] for step in range(50)]
    assert firsts != sorted(firsts) and firsts != sorted(firsts, reverse=True)
