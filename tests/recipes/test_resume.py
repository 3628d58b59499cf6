"""A run that was killed goes on as if nothing had happened; what cannot be gone on with is refused and left alone."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from processes import STAGE_3, TIMEOUT_S, finish, kill, outcome, start
from worlds import Chain, make_corpus, make_outdated, make_task

STEPS, SAVE_EVERY = 20, 4
RAISE_AT = 10  # the last checkpoint is then step 8's
SLOW_S = 0.1  # a step of a run that is about to be killed, so that it is not over first
VERBS = ("pretrain", "tune", "recycle")
RESULTS = {"pretrain": "lineage.json", "tune": "manifest.json", "recycle": "manifest.json"}


class World(Chain):
    """Where the small world of this file lies, and runs in it. Dropout is on: its draws have to be resumed as well."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.corpus = make_corpus(folder / "corpus")
        self.outdated = make_outdated(self.base, self.task, folder / "outdated")

    def run(self, verb: str, out: str, stage: int = 2, settings: dict[str, Any] | None = None, **how) -> dict[str, Any]:
        config = {
            "out": self.folder / out,
            "base": self.upgraded if verb == "recycle" else self.base,
            "max_steps": STEPS,
            "train_batch_size": 8,
            "learning_rate": 2e-3,
            "warmup_steps": 3,
            "max_length": 24,
            "eval_every": 3,
            "save_every": SAVE_EVERY,
        }
        if verb == "pretrain":
            config.update(corpus=str(self.corpus))
        else:
            config.update(task=str(self.task))
        if verb == "recycle":
            config.update(method="both", weights=self.outdated, old_base=self.base)
        zero = {"stage": stage, **(STAGE_3 if stage == 3 else {})}
        return {"verb": verb, "config": {**config, **(settings or {})}, "ds_config": {"zero_optimization": zero}, **how}

    def out(self, name: str) -> Path:
        return self.folder / name


def kill_after_first_checkpoint(process: subprocess.Popen, out: Path) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not list(out.glob("checkpoints/step-*/complete.json")):
        assert process.poll() is None, (out.parent / "log").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    kill(process)


def content(folder: Path) -> dict[str, str]:
    """Digest of every file below a folder, and the folders."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in folder.rglob("*")
    }


def results(out: Path) -> dict[str, str]:
    """Digests of the tensors a run wrote."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in out.glob("*.safetensors")}


def history(verb: str, out: Path) -> Any:
    """What the result says of the run, without times."""
    record = json.loads((out / RESULTS[verb]).read_text())
    if verb == "pretrain":
        return record["heldout"]
    rows = [{name: value for name, value in row.items() if name != "seconds"} for row in record["history"]]
    assert [row["step"] for row in rows] == [0, 3, 6, 9, 12, 15, 18, 20]
    return rows, record["metrics"]["test"], record["metrics"]["best_step"]


def assert_same(verb: str, resumed: Path, uninterrupted: Path) -> None:
    assert outcome(resumed) == outcome(uninterrupted) == {}
    assert len(results(uninterrupted)) == {"pretrain": 1, "tune": 2, "recycle": 2}[verb]
    assert results(resumed) == results(uninterrupted)
    assert history(verb, resumed) == history(verb, uninterrupted)
    assert not (resumed / "checkpoints").exists() and not list(resumed.glob("best-*"))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("resume"))


def flip_a_byte(out: Path) -> None:
    file = out / "checkpoints" / "step-00000008" / "rank-00000.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def half_written(out: Path) -> None:
    """What a kill during or after the writing of later checkpoints leaves behind."""
    for later in (".partial-step-00000012-0badcafe", "step-00000016"):
        shutil.copytree(out / "checkpoints" / "step-00000008", out / "checkpoints" / later)
    (out / "checkpoints" / "step-00000016" / "complete.json").unlink()
    (out / ".lock").write_text("process 1 on another host")


def with_other_dropout(base: Path, folder: Path) -> Path:
    """The same weights, in whose training more is dropped."""
    shutil.copytree(base, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "attention_probs_dropout_prob": 0.3}))
    return folder


def drop_all(out: Path) -> None:
    for file in out.glob("checkpoints/step-*/complete.json"):
        file.write_text("{}")


# name -> (what happened to what the run left, settings it is resumed with)
GONE_ON_WITH: dict[str, tuple[Any, dict[str, Any]]] = {
    "half-written": (half_written, {"log_every": 3, "save_every": 5, "save_total_limit": 1}),
    "changed-file": (flip_a_byte, {"save_every_minutes": 0.0001}),
}
# name -> (what happened, settings it is resumed with, what the refusal says)
REFUSED = {
    "changed-rate": (None, {"learning_rate": 1e-3}, "learning_rate: is 0.001, but"),
    "changed-seed": (None, {"seed": 21}, "seed: is 21, but"),
    "changed-steps": (None, {"max_steps": 30}, "max_steps: is 30, but"),
    "changed-dropout": (None, {}, "base's dropout: is not what the run in"),
    "changed-task": (None, {}, "task: is not what the run in"),
    "all-broken": (drop_all, {}, "none of its 2 checkpoints is whole"),
}


@pytest.fixture(scope="module")
def runs(world: World) -> World:
    """Three processes, each killed at another verb, and a fourth one that finishes.

    The first one also fails by itself; what it left is copied, damaged in several ways, and resumed by the second.
    """
    folders = [world.folder / f"process-{i}" for i in range(4)]
    raised = world.run("tune", "raised", raise_at=RAISE_AT)
    first = [raised, world.run("pretrain", "pretrain", slow=SLOW_S)]
    kill_after_first_checkpoint(start(folders[0], first), world.out("pretrain"))

    assert outcome(world.out("raised")) == {"error": "Interrupted", "message": f"at step {RAISE_AT}"}
    second = []
    for name, (damage, settings, *_) in {**GONE_ON_WITH, **REFUSED}.items():
        shutil.copytree(world.out("raised"), world.out(name))
        if damage:
            damage(world.out(name))
        second.append(world.run("tune", name, settings=settings, resume=True))
    second[-3]["replace"] = [str(world.base), str(with_other_dropout(world.base, world.folder / "other-base"))]
    second[-2]["replace"] = [str(world.task), str(make_task(world.folder / "other-task", seed=5))]
    world.out("foreign").mkdir()
    (world.out("foreign") / "thesis.txt").write_text("the only copy")
    world.before = {name: content(world.out(name)) for name in ("foreign", "raised", *REFUSED)}
    second += [world.run("tune", "foreign", resume=True), world.run("tune", "raised")]
    second += [world.run("pretrain", "pretrain", resume=True), world.run("tune", "tune", slow=SLOW_S)]
    kill_after_first_checkpoint(start(folders[1], second), world.out("tune"))
    world.refusals = {name: (outcome(world.out(name)), content(world.out(name))) for name in world.before}

    third = [world.run("tune", "tune", resume=True), world.run("recycle", "recycle", slow=SLOW_S)]
    kill_after_first_checkpoint(start(folders[2], third), world.out("recycle"))

    world.finished = content(world.out("tune"))
    last = [world.run("recycle", "recycle", resume=True), world.run("tune", "raised", resume=True)]
    last += [world.run(verb, f"{verb}-uninterrupted") for verb in VERBS]
    last += [world.run("tune", "tune", resume=True)]
    finish(start(folders[3], last), folders[3])
    return world


@pytest.mark.parametrize("verb", VERBS)
def test_a_killed_run_ends_with_the_same_bits_and_history(runs, verb):
    assert_same(verb, runs.out(verb), runs.out(f"{verb}-uninterrupted"))


def test_a_run_that_failed_by_itself_ends_with_the_same_bits_and_history(runs):
    assert_same("tune", runs.out("raised"), runs.out("tune-uninterrupted"))


@pytest.mark.parametrize("name", GONE_ON_WITH)
def test_what_is_half_written_or_damaged_is_passed_over_and_when_to_save_may_change(runs, name):
    assert_same("tune", runs.out(name), runs.out("tune-uninterrupted"))


@pytest.mark.parametrize("name", REFUSED)
def test_a_changed_setting_or_content_is_refused_and_all_that_the_run_left_stays(runs, name):
    ended, after = runs.refusals[name]
    assert ended["error"] == "InputError"
    assert REFUSED[name][-1] in ended["message"]
    # the engine's event files are opened before the checkpoint is, and run.json notes the new place of the directory
    before, after = (
        {file: digest for file, digest in files.items() if not file.startswith(("tensorboard", "run.json"))}
        for files in (runs.before[name], after)
    )
    assert after == before
    assert {"checkpoints/step-00000008/complete.json", "best-00000006.safetensors"} & before.keys()


def test_a_directory_with_something_else_is_refused_and_untouched(runs):
    ended, after = runs.refusals["foreign"]
    assert ended["error"] == "InputError" and "holds no run of recyclable" in ended["message"]
    assert after == runs.before["foreign"]


def test_an_unfinished_run_is_not_begun_again_without_resume(runs):
    ended, after = runs.refusals["raised"]
    assert ended["error"] == "InputError" and "resume it with --resume" in ended["message"]
    assert after == runs.before["raised"]


def test_a_finished_run_is_not_run_again(runs):
    assert content(runs.out("tune")) == runs.finished


# name -> (verb, ZeRO stage, settings, more of the ds_config)
ACCUMULATED = {"train_micro_batch_size_per_gpu": 2}
TWO_RANKS: dict[str, tuple[str, int, dict[str, Any], dict[str, Any]]] = {
    "two-2": ("tune", 2, {}, {}),
    "two-3": ("tune", 3, {}, {}),
    "online-3": ("recycle", 3, {"teacher": "online"}, ACCUMULATED),
    "packed-1": ("pretrain", 1, {}, ACCUMULATED),
}


@pytest.fixture(scope="module")
def two_ranks(world: World) -> World:
    cases = []
    for name, (verb, stage, settings, more) in TWO_RANKS.items():
        hows: tuple[tuple[str, dict[str, Any]], ...] = (
            (f"{name}-uninterrupted", {}),
            (name, {"raise_at": RAISE_AT}),
            (name, {"resume": True}),
        )
        for out, how in hows:
            case = world.run(verb, out, stage, settings, **how)
            cases.append({**case, "ds_config": {**case["ds_config"], **more}})
    folder = world.folder / "two-ranks"
    finish(start(folder, cases, nproc=2), folder)
    return world


@pytest.mark.parametrize("name", TWO_RANKS)
def test_two_ranks_resume_with_the_same_bits(two_ranks, name):
    assert_same(TWO_RANKS[name][0], two_ranks.out(name), two_ranks.out(f"{name}-uninterrupted"))
