"""Runs that go on on other numbers of ranks and at other ZeRO stages: their losses, and the examples of their steps."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forked
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from train_ranks import main as train
from worlds import make_base, make_task

from recyclable.errors import RunError

BATCH, EVERY, TOLERANCE = 12, 3, 1e-5
_NOTHING_WHOLE = {"stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": 0}
TRAINED: dict[str, tuple[str, dict[str, str]]] = {
    "encoder": ("tune", {"base": "bert", "task": "task"}),
    "encoder, LoRA": ("tune", {"base": "bert", "task": "task", "tuning": "lora"}),
    "decoder": ("pretrain", {"base": "gpt2", "corpus": "corpus.txt"}),
    "decoder, LoRA": ("tune", {"base": "gpt2", "task": "task", "tuning": "lora"}),
}


def resizes(folder: Path, quick: bool, tell: Callable[[int], None]) -> dict[str, Any]:
    """{"tried", "equal", "max_loss_diff", "ids_wrong"} of runs that are broken off and go on on 1, 2, 4, 2, 1 ranks.

    Each at ZeRO-1, 2 and 3, and through the stages 2, 3, 1, 3, 2; encoder and decoder, full and LoRA. Equal: no loss
    of any step, done again or not, is further than 1e-5 from the run that was left alone at stage 0 on one rank, and
    no step had other examples. `ids_wrong` counts examples that a step had more or fewer than it should.
    """
    from language_models import save_tiny, short_texts

    ranks = (1, 2, 1) if quick else (1, 2, 4, 2, 1)
    stages = [(2, 3, 1)] if quick else [*((stage,) * 5 for stage in (1, 2, 3)), (2, 3, 1, 3, 2)]
    steps = EVERY * len(ranks)
    make_base(folder / "bert")
    make_task(folder / "task", dev=9, test=9)
    save_tiny("gpt2", folder / "gpt2")
    short_texts(folder / "corpus.txt", documents=150)

    def run(what: str, stage: int, out: Path, launch: int, breaks: bool) -> dict[str, Any]:
        verb, own = TRAINED[what]
        config = {name: value if name == "tuning" else str(folder / value) for name, value in own.items()}
        config |= {"out": str(out), "max_steps": steps, "train_batch_size": BATCH, "learning_rate": 2e-3}
        config |= {"warmup_steps": 2, "max_length": 24, "eval_every": steps, "save_every": EVERY, "log_every": 1}
        zero = {"stage": stage, **(_NOTHING_WHOLE if stage == 3 else {})}
        found = {"verb": verb, "config": {**config, "dropout": 0.0}, "ds_config": {"zero_optimization": zero}}
        found |= {"items": f"{out}-{launch}", "resume": launch > 0, "outcome": f"{out}-{launch}"}
        last = launch == len(ranks) - 1
        return {**found, "raise_at": (launch + 1) * EVERY + 1} if breaks and not last else found

    cases = [(what, each) for what in TRAINED for each in stages]
    names = {case: folder / f"{case[0].replace(', ', '-')}-{''.join(map(str, case[1]))}" for case in cases}
    whole = {what: folder / f"{what.replace(', ', '-')}-whole" for what in TRAINED}
    for launch, world in enumerate(ranks):
        runs = [run(*_at(case, launch), names[case], launch, True) for case in cases]
        if launch == 0:
            runs += [run(what, 0, out, 0, False) for what, out in whole.items()]
        _launch(folder / f"launch-{launch}.json", runs, world)
        tell(len(runs))
    most, equal, wrong = 0.0, 0, 0
    for what, each in cases:
        out = names[what, each]
        wanted, planned = dict(_losses(whole[what])), _examples(whole[what], 0, 0)
        found = _losses(out)
        if {step for step, _ in found} != set(wanted):
            raise RunError(out, f"has losses of {len(found)} steps, expected those of {len(wanted)}")
        difference = max(abs(loss - wanted[step]) for step, loss in found)
        others = sum(
            len(set(some) ^ set(planned[step])) + abs(len(some) - len(planned[step]))
            for launch in range(len(ranks))
            for step, some in _examples(out, launch, launch * EVERY).items()
        )
        most, wrong = max(most, difference), wrong + others
        equal += difference <= TOLERANCE and not others
    return {"tried": len(cases), "equal": equal, "max_loss_diff": most, "ids_wrong": wrong}


def _at(case: tuple[str, tuple[int, ...]], launch: int) -> tuple[str, int]:
    return case[0], case[1][launch]


def _launch(file: Path, runs: list[dict[str, Any]], ranks: int) -> None:
    """All runs one after the other in one group of ranks."""
    file.write_text(json.dumps(runs))
    log = file.with_suffix(".log")
    started = forked.start(train, str(file), ranks=ranks, log=log)
    for rank in started:
        rank.join()
    outcomes = [json.loads(Path(f"{run['outcome']}.json").read_text()) for run in runs if not any(_status(started))]
    if any(_status(started)) or any(found.get("error") == "InputError" for found in outcomes):
        raise RunError(file, f"ranks ended with {_status(started)}: {log.read_text(errors='replace')[-300:]}")


def _status(ranks: list[Any]) -> list[int]:
    return [rank.exitcode for rank in ranks]


def _losses(out: Path) -> list[tuple[int, float]]:
    events = EventAccumulator(str(out / "tensorboard")).Reload().Scalars("train/loss")
    return [(event.step, event.value) for event in events]


def _examples(out: Path, launch: int, first: int) -> dict[int, list[tuple[int, int]]]:
    """Step -> all ranks' examples in a launch, whose first step is that one."""
    found: dict[int, list[tuple[int, int]]] = {}
    for file in out.parent.glob(f"{out.name}-{launch}-*"):
        for number, line in enumerate(file.read_text().splitlines()):
            found.setdefault(first + number, []).extend(tuple(item) for batch in json.loads(line) for item in batch)
    return found
