"""Kills -9 at random moments of short runs, and whether the runs go on to the uninterrupted run's bits."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import forked
import psutil
from language_models import save_tiny, short_texts
from worlds import make_base, make_task, write_config

from recyclable.errors import RunError

RANKS, STEPS, IN_A_ROW = 2, 12, 5
VERBS = {"tune": {"base": "bert", "task": "task"}, "pretrain": {"base": "gpt2", "corpus": "corpus.txt"}}
_SLOW_S = 0.02
"""What each write and each sync takes: a save is under way for a while, as on a busy disk."""
_PEERS_S, _END_S = 30.0, 300.0
_NOTHING_WHOLE = {"stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": 0}


@dataclass
class Kill:
    """One of them, and what it met."""

    seed: int
    verb: str
    stage: int
    in_save: bool
    """Aimed at a background save."""
    who: str = ""
    phase: str = ""
    after_s: float = 0.0
    lost: bool = False
    """Whether a checkpoint that was whole before was not gone on from."""


@dataclass
class World:
    """Models and data in a folder, and what uninterrupted runs of them came to."""

    folder: Path
    tensors: dict[tuple[str, int], dict[str, str]] = field(default_factory=dict)
    seconds: dict[tuple[str, int], tuple[float, float]] = field(default_factory=dict)
    """Until the first save began, and in all."""

    def __post_init__(self) -> None:
        make_base(self.folder / "bert")
        make_task(self.folder / "task", train=40, dev=9, test=9)
        save_tiny("gpt2", self.folder / "gpt2")
        short_texts(self.folder / "corpus.txt", documents=60)
        for verb, own in VERBS.items():
            config = {name: str(self.folder / value) for name, value in own.items()}
            config |= {"max_steps": STEPS, "train_batch_size": 4, "learning_rate": 2e-3, "warmup_steps": 2}
            config |= {"out": "out", "max_length": 24, "eval_every": 5, "save_every": 2}
            write_config(self.folder / f"{verb}.yaml", config)
        for stage in range(4):
            zero = {"stage": stage, **(_NOTHING_WHOLE if stage == 3 else {})}
            (self.folder / f"{stage}.json").write_text(json.dumps({"zero_optimization": zero}))

    def uninterrupted(self, verb: str, stage: int) -> None:
        """Run one, for what others are compared with."""
        out, begin, first = self.folder / f"whole-{verb}-{stage}", time.monotonic(), None
        ranks = self.start(verb, stage, out)
        while any(rank.is_alive() for rank in ranks):
            if first is None and _whole(out):
                first = time.monotonic() - begin
            time.sleep(0.01)
        _succeeded(ranks, out)
        self.seconds[verb, stage] = first or 0.0, time.monotonic() - begin
        self.tensors[verb, stage] = _tensors(out)

    def start(self, verb: str, stage: int, out: Path) -> list[Any]:
        """Ranks of a run, or of what is left of it."""
        return forked.start(_train, verb, self.folder, stage, out, out.is_dir(), ranks=RANKS, log=Path(f"{out}.log"))


def kills(folder: Path, count: int, commands: int, tell: Callable[[Kill], None]) -> dict[str, int]:
    """{"tried", "exact"}: kills, and how many of them are in the past of a run that ended as if there had been none.

    A run is killed up to five times, resumed after each, and then left alone. Every other kill waits for a background
    save. Who is killed: one rank, after which the others end by themselves or are ended as the command does, or all
    at once, as when a machine dies; `commands` of them are a rank of the real command, which must end by itself.
    """
    world, tried, exact, number, seed = World(folder), 0, 0, 0, 0
    while tried < count:
        verb, stage = list(VERBS)[number // 4 % 2], number % 4
        if (verb, stage) not in world.tensors:
            world.uninterrupted(verb, stage)
        out, done = folder / f"run-{number}", []
        by_command = number < commands
        for _ in range(1 if by_command else min(IN_A_ROW, count - tried)):
            kill = Kill(seed, verb, stage, in_save=seed % 2 == 1)
            seed += 1
            if not (_of_command if by_command else _of_ranks)(world, kill, out):
                break  # it was over before
            done.append(kill)
            tell(kill)
        before, said = _whole(out), len(_log(out))
        _succeeded(world.start(verb, stage, out), out)
        if done:
            done[-1].lost |= _lost(out, before, said)
        tried += len(done)
        if _tensors(out) == world.tensors[verb, stage] and not any(kill.lost for kill in done):
            exact += len(done)
        number += 1
    return {"tried": tried, "exact": exact}


def _of_ranks(world: World, kill: Kill, out: Path) -> bool:
    """Start a run, or go on with it, and kill; False where it was over before."""
    before, left, said = _whole(out), _partial(out), len(_log(out))
    begin, ranks = time.monotonic(), world.start(kill.verb, kill.stage, out)
    if not _moment(world, kill, lambda: _partial(out) - left, out, lambda: all(rank.is_alive() for rank in ranks)):
        _succeeded(ranks, out)
        return False
    victims = _victims(kill, [rank.pid for rank in ranks])
    _note(kill, out, time.monotonic() - begin, left)
    for pid in victims:
        os.kill(pid, signal.SIGKILL)
    for rank in ranks:
        rank.join(_PEERS_S)
        rank.kill()
        rank.join()
    kill.lost = _lost(out, before, said)
    return True


def _of_command(world: World, kill: Kill, out: Path) -> bool:
    """The same through `recyclable VERB`: it must end within 30 s, with a failure, and leave nobody."""
    config, machine = world.folder / f"{kill.verb}.yaml", world.folder / f"{kill.stage}.json"
    command = [sys.executable, "-m", "recyclable.cli", kill.verb, config, "--nproc", RANKS, "--out", out]
    begin = time.monotonic()
    with Path(f"{out}.log").open("a") as log:
        told = [str(each) for each in (*command, "--deepspeed_config", machine)]
        process = subprocess.Popen(told, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    while not (out / "checkpoints").is_dir() and process.poll() is None:  # imports and start take long, and differ
        time.sleep(0.05)
    time.sleep(random.Random(kill.seed).uniform(0, 1))
    family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    ranks = [each for each in family if each.is_running() and "RANK" in each.environ() and not _guards(each)]
    if not ranks:
        process.wait()
        return False
    victims = _victims(kill, [rank.pid for rank in ranks])
    _note(kill, out, time.monotonic() - begin, frozenset())
    for pid in victims:
        os.kill(pid, signal.SIGKILL)
    try:
        status = process.wait(_PEERS_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise RunError(out, f"the command had not ended {_PEERS_S:.0f} s after a rank was killed") from None
    gone, alive = psutil.wait_procs(family, timeout=5)
    if status == 0 and not alive and _ended(out):
        return False  # its ranks had said that they were done
    if status == 0 or alive:
        raise RunError(out, f"the command ended with {status} and left {len(alive)} of {len(gone) + len(alive)}")
    kill.who = f"command's {kill.who}"
    return True


def _guards(process: psutil.Process) -> bool:
    """Whether it is a rank's guardian, which has its rank's environment."""
    return "recyclable.launching.guardian" in process.cmdline()


def _moment(world: World, kill: Kill, saving: Callable[[], Any], out: Path, alive: Callable[[], bool]) -> bool:
    """Wait for when to kill: somewhere in what is left of the run, or in a save from then on; False: it ended."""
    first, whole = world.seconds[kill.verb, kill.stage]
    draw = random.Random(kill.seed)
    until = first + (whole - first) * (1 - _whole(out) / STEPS)
    begin, moment = time.monotonic(), draw.uniform(0, until)
    while time.monotonic() - begin < moment or (kill.in_save and not saving()):
        if not alive():
            return False
        time.sleep(0.005)
    if kill.in_save:
        time.sleep(draw.uniform(0, 10 * _SLOW_S))
    return alive()


def _victims(kill: Kill, ranks: list[int]) -> list[int]:
    draw = random.Random(kill.seed + 1_000_000)
    if draw.random() < 0.25:
        kill.who = "all"
        return ranks
    number = draw.randrange(len(ranks))
    kill.who = f"rank {number}"
    return [ranks[number]]


def _note(kill: Kill, out: Path, after_s: float, left: frozenset[str]) -> None:
    kill.after_s = round(after_s, 2)
    begun = (out / "checkpoints").is_dir() or "step 0/" in _log(out)
    kill.phase = "save" if _partial(out) - left else "end" if _ended(out) else "step" if begun else "start"


def _whole(out: Path) -> int:
    """The step of the newest checkpoint that is marked as whole; 0 without."""
    found = [int(path.parent.name.removeprefix("step-")) for path in out.glob("checkpoints/step-*/complete.json")]
    return max(found, default=0)


def _partial(out: Path) -> frozenset[str]:
    """Saves that are under way, or were when a run died."""
    return frozenset(path.name for path in out.glob("checkpoints/.partial-step-*"))


def _log(out: Path) -> str:
    """All that the starts of a run have said."""
    file = Path(f"{out}.log")
    return file.read_text(errors="replace") if file.exists() else ""


def _lost(out: Path, before: int, said: int) -> bool:
    """Whether a start that had that checkpoint, and has come so far, did not go on from it."""
    found = re.findall(r"resumed at step (\d+)", _log(out)[said:])
    return (_whole(out) < before and not _ended(out)) or any(int(step) < before for step in found)


def _ended(out: Path) -> bool:
    return any((out / name).exists() for name in ("lineage.json", "manifest.json"))


def _tensors(out: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(out.glob("*.safetensors"))}


def _succeeded(ranks: list[Any], out: Path) -> None:
    for rank in ranks:
        rank.join(_END_S)
    statuses = [rank.exitcode for rank in ranks]
    for rank in ranks:
        rank.kill()
    if any(statuses):
        lines = _log(out).splitlines()
        raise RunError(out, f"ranks ended with {statuses}: {lines[-1] if lines else 'nothing said'}")


def _train(verb: str, folder: Path, stage: int, out: Path, resume: bool) -> None:
    """What a rank does."""
    from recyclable import distributed
    from recyclable.config.run_file import read_run_file

    for name in ("pwrite", "fsync"):
        setattr(os, name, _slowly(getattr(os, name)))
    distributed.init()
    content = read_run_file(folder / f"{verb}.yaml", [f"out={json.dumps(str(out))}"])
    recipe, settings = (import_module(f"recyclable.recipes.{name}") for name in (verb, f"{verb}_settings"))
    config = getattr(settings, f"read_{verb}_settings")(content, "faults")
    getattr(recipe, verb)(config, json.loads((folder / f"{stage}.json").read_text()), resume)
    distributed.shutdown()


def _slowly(call: Callable[..., Any]) -> Callable[..., Any]:
    def slow(*arguments: Any) -> Any:
        time.sleep(_SLOW_S)
        return call(*arguments)

    return slow
