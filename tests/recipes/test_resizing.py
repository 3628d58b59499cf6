"""A run goes on on other ranks and at another ZeRO stage: the same losses, the same examples in the same steps."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from language_models import save_tiny, short_texts
from processes import STAGE_3, finish, outcome, start
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from worlds import make_base, make_task

RANKS = (1, 2, 1)  # one launch each
STEPS, BATCH = 9, 12
BREAKS = (4, 7, None)  # after these steps the runs of a launch fail; the last checkpoint is then step 3's and 6's
BF16 = {"bf16": {"enabled": True}}
# what is trained -> (verb, its settings, more of the ds_config, how far losses may differ)
TRAINED: dict[str, tuple[str, dict[str, Any], dict[str, Any], float]] = {
    "encoder": ("tune", {"base": "bert", "task": "task"}, {}, 1e-5),
    "encoder-lora": ("tune", {"base": "bert", "task": "task", "tuning": "lora"}, {}, 1e-5),
    "encoder-bf16": ("tune", {"base": "bert", "task": "task"}, BF16, 1e-2),  # what ranks send each other is bf16, too
    "decoder": ("pretrain", {"base": "gpt2", "corpus": "new.txt"}, {}, 1e-5),
    "decoder-lora": ("tune", {"base": "gpt2", "task": "task", "tuning": "lora"}, {}, 1e-5),
}
# (what, its ZeRO stage in each launch)
CASES = [("encoder", stages) for stages in ((1, 1, 1), (2, 2, 2), (3, 3, 3))]
CASES += [("encoder-lora", (0, 2, 3)), ("encoder-bf16", (2, 3, 1)), ("decoder", (2, 3, 1)), ("decoder-lora", (3, 1, 2))]


def name_of(what: str, stages: tuple[int, ...] | None) -> str:
    return f"{what}-{''.join(map(str, stages or ('whole',)))}"


def run_of(folder: Path, what: str, stages: tuple[int, ...] | None, launch: int) -> dict[str, Any]:
    verb, settings, more, _ = TRAINED[what]
    out, stage = folder / name_of(what, stages), stages[launch] if stages else 0
    config = {
        **{"out": out, "max_steps": STEPS, "train_batch_size": BATCH, "learning_rate": 2e-3, "warmup_steps": 2},
        **{"max_length": 24, "eval_every": STEPS, "save_every": 3, "log_every": 1, "dropout": 0.0},
        **{key: str(folder / value) if key != "tuning" else value for key, value in settings.items()},
    }
    zero = {"stage": stage, **(STAGE_3 if stage == 3 else {})}
    run = {"verb": verb, "config": config, "ds_config": {"zero_optimization": zero, **more}, "items": f"{out}-{launch}"}
    return {**run, "resume": launch > 0, **({"raise_at": BREAKS[launch]} if stages else {})}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resizing")
    make_base(folder / "bert")
    make_task(folder / "task", dev=9, test=9)
    save_tiny("gpt2", folder / "gpt2")
    short_texts(folder / "new.txt", documents=100)
    for launch, ranks in enumerate(RANKS):
        runs = [run_of(folder, *case, launch) for case in CASES]
        if launch == 0:
            runs += [run_of(folder, what, None, 0) for what in TRAINED]
        finish(
            start(folder / f"launch-{launch}", runs, nproc=ranks if ranks > 1 else None), folder / f"launch-{launch}"
        )
    return folder


def losses(out: Path) -> list[tuple[int, float]]:
    events = EventAccumulator(str(out / "tensorboard")).Reload().Scalars("train/loss")
    return [(event.step, event.value) for event in events]


def items(folder: Path, case: str, launch: int, first: int) -> dict[int, list[list[int]]]:
    """Step -> all ranks' examples."""
    found = defaultdict(list)
    for file in folder.glob(f"{case}-{launch}-*"):
        for number, line in enumerate(file.read_text().splitlines()):
            found[first + number] += [item for batch in json.loads(line) for item in batch]
    return {step: sorted(found[step]) for step in sorted(found)}


@pytest.mark.parametrize("case", CASES, ids=lambda case: name_of(*case))
def test_losses_and_examples_are_those_of_the_run_that_was_left_alone(world: Path, case: tuple) -> None:
    what, (resized, whole) = case[0], (name_of(*case), name_of(case[0], None))
    assert outcome(world / resized) == outcome(world / whole) == {}
    wanted = dict(losses(world / whole))
    found = losses(world / resized)
    assert sorted({step for step, _ in found}) == list(wanted) == list(range(1, STEPS + 1))
    assert max(abs(loss - wanted[step]) for step, loss in found) < TRAINED[what][-1]
    planned, done = items(world, whole, 0, 0), [items(world, resized, n, first) for n, first in enumerate((0, 3, 6))]
    assert [list(steps) for steps in done] == [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8]]
    assert all(steps[step] == planned[step] for steps in done for step in steps)
    used = [tuple(item) for step in planned.values() for item in step]
    assert len(set(used)) == len(used) == STEPS * BATCH
    assert what.startswith("decoder") or {epoch for epoch, _ in used} == {0, 1}, "an epoch ends on the way"
