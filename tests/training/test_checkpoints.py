"""Checkpoints by themselves: whole or passed over, whatever becomes of their files, wherever the writer dies."""

from __future__ import annotations

import json
import os
import random
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from blake3 import blake3
from faults import DAMAGES, LAYOUT, killed_at, loaded, pieces_of, record_of, save_one, state_of, write_checkpoint

from recyclable.errors import InputError, RunError
from recyclable.training.checkpoint import saving
from recyclable.training.checkpoint.choosing import newest_whole
from recyclable.training.checkpoint.rank_file import RankFiles, write_pieces
from recyclable.training.checkpoint.record import MARK
from recyclable.training.checkpoint.saving import Saver
from recyclable.training.pieces import WEIGHT, Piece
from recyclable.weights.files import write_tensors
from recyclable.weights.hashes import sha256_json

# ---- which one is taken --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(25))
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(damage, seed: int, tmp_path: Path, capsys) -> None:
    for step in (4, 8):
        newest = write_checkpoint(tmp_path, step, ranks=3)
    damage(newest, random.Random(seed))
    assert loaded(tmp_path) == 4
    assert "notice: checkpoint step-00000008 is broken and passed over: " in capsys.readouterr().out


def test_the_newest_whole_one_is_taken(tmp_path: Path) -> None:
    for step in (4, 12, 8):
        write_checkpoint(tmp_path, step)
    assert loaded(tmp_path) == 12


def test_without_any_there_is_none_and_with_only_broken_ones_the_run_is_not_begun_anew(tmp_path: Path) -> None:
    assert loaded(tmp_path) is None
    (tmp_path / "checkpoints" / ".partial-step-00000004-0").mkdir(parents=True)
    assert loaded(tmp_path) is None
    (write_checkpoint(tmp_path, 4) / MARK).unlink()
    with pytest.raises(InputError, match=r"none of its 1 checkpoints is whole .*lacks complete.json"):
        loaded(tmp_path)


def test_one_whose_best_weights_are_damaged_is_passed_over(tmp_path: Path) -> None:
    for step in (4, 8):
        write_checkpoint(tmp_path, step)
    file = tmp_path / "best-00000008.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x55")
    assert loaded(tmp_path) == 4
    (tmp_path / "best-00000004.safetensors").unlink()
    with pytest.raises(InputError, match="none of its 2 checkpoints is whole"):
        loaded(tmp_path)


def test_one_of_other_parameters_is_none_of_this_run(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 4)
    with pytest.raises(InputError, match=r"is of other parameters than this run trains: 'layer.bias' and 0 more"):
        newest_whole(tmp_path, {**LAYOUT, "layer.bias": [4]})


def forged(content: dict[str, Any]) -> str:
    content.pop("digest", None)
    return json.dumps({**content, "digest": sha256_json(content)})


FORGERIES: dict[str, Any] = {
    "no-object": lambda _: "[]",
    "no-json": lambda _: "{",
    "deep": lambda _: "[" * 100_000,
    "digits": lambda _: '{"step": ' + "9" * 6000 + "}",
    "nan": lambda text: text.replace('"seconds": 1.5', '"seconds": NaN'),
    "twice": lambda text: text.replace("{", '{"ranks": 2, ', 1),
    "no-digest": lambda text: json.dumps({k: v for k, v in json.loads(text).items() if k != "digest"}),
    "unsealed": lambda text: text.replace('"seconds": 1.5', '"seconds": 2.5'),
    "deepspeeds": lambda _: forged({"step": 8, "files": {"engine/mp_rank_00_model_states.pt": "0" * 64}}),
    **{
        name: lambda text, change=change: forged({**json.loads(text), **change})
        for name, change in {
            "no-files": {"files": {}},
            "many-ranks": {"ranks": 10**15},
            "elsewhere": {"files": {"../../other.safetensors": {"bytes": 1, "blake3": "0" * 64}}, "ranks": 1},
            "files-as-list": {"files": []},
            "ranks-as-text": {"ranks": "3"},
            "ranks-true": {"ranks": True},
            "no-progress": {"progress": None},
            "negative": {"progress": {"step": -8}},
            "other-step": {"progress": {"step": 12}},
            "best-of-nothing": {"progress": {"step": 8, "best_step": 4}},
            "best-without-end": {"progress": {"step": 8, "best": "inf"}},
            "row-of-no-step": {"progress": {"step": 8, "history": [{"accuracy": 0.5}]}},
            "escape": {"\x1b[2Jhidden": 1},
        }.items()
    },
}


@pytest.mark.parametrize("name", FORGERIES)
def test_a_forged_record_is_passed_over_in_one_printable_line(name: str, tmp_path: Path, capsys) -> None:
    for step in (4, 8):
        newest = write_checkpoint(tmp_path, step, ranks=3)
    (newest / MARK).write_text(FORGERIES[name]((newest / MARK).read_text()))
    assert loaded(tmp_path) == 4
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and said.strip().isprintable() and "step-00000008 is broken" in said


def test_a_pickle_with_its_matching_digest_is_refused_unopened(tmp_path: Path) -> None:
    newest = write_checkpoint(tmp_path, 8)

    class Trap:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "sprung"),)

    torch.save({"x": Trap()}, newest / "rank-00000.safetensors")
    record = json.loads((newest / MARK).read_text())
    data = (newest / "rank-00000.safetensors").read_bytes()
    record["files"] = {"rank-00000.safetensors": {"bytes": len(data), "blake3": blake3(data).hexdigest()}}
    (newest / MARK).write_text(forged(record))
    with pytest.raises(InputError, match="is not a valid safetensors file"):
        loaded(tmp_path)
    assert not (tmp_path / "sprung").exists()


# ---- pieces and ranges ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_any_range_is_read_from_whichever_files_hold_it(ranks: int, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, 4, ranks)
    files = RankFiles(sorted(folder.glob("rank-*")), LAYOUT)
    for kind, tensors in state_of(4).items():
        assert files.kind(kind).names == sorted(LAYOUT)
        for name, values in tensors.items():
            flat = values.flatten()
            for start in range(len(flat) + 1):
                for stop in range(start, len(flat) + 1):
                    assert torch.equal(files.kind(kind).read(name, start, stop), flat[start:stop]), (name, start, stop)


def one_file(path: Path, *pieces: tuple[str, int, int]) -> RankFiles:
    write_pieces(path, [Piece(name, start, {WEIGHT: torch.ones(numel)}, 1.0) for name, start, numel in pieces])
    return RankFiles([path], {"w": [3, 2]})


def test_pieces_that_leave_a_hole_overlap_or_are_of_no_parameter_are_refused(tmp_path: Path) -> None:
    one_file(tmp_path / "whole", ("w", 0, 4), ("w", 4, 2))
    for number, pieces in enumerate(
        [[("w", 0, 4)], [("w", 0, 4), ("w", 5, 1)], [("w", 0, 4), ("w", 3, 3)], [("w", 0, 7)], [("v", 0, 6)], []]
    ):
        with pytest.raises(InputError, match=r"does not hold each of the 6 elements|is no piece of a trained"):
            one_file(tmp_path / f"file-{number}", *pieces)


@pytest.mark.parametrize("steps", ["", "{", '{"v@0": 1}', '{"w@0": -1}', '{"w@0": "1"}', '{"w@0": NaN}'])
def test_steps_that_are_none_are_refused(steps: str, tmp_path: Path) -> None:
    write_tensors(tmp_path / "file", {"weight:w@0": torch.ones(6)}, {"steps": steps})
    with pytest.raises(InputError, match=r"steps|broken JSON"):
        RankFiles([tmp_path / "file"], {"w": [3, 2]})


# ---- writing -------------------------------------------------------------------------------------------------------


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_the_last_few_stay_with_the_best_weights_that_they_name(tmp_path: Path) -> None:
    for step in (2, 4, 6):
        save_one(tmp_path, step)
    files = {f"checkpoints/step-0000000{step}/{file}" for step in (4, 6) for file in (MARK, "rank-00000.safetensors")}
    assert names(tmp_path) == files | {f"best-0000000{step}.safetensors" for step in (4, 6)}
    assert loaded(tmp_path) == 6


def test_what_comes_after_a_step_that_is_written_again_goes(tmp_path: Path) -> None:
    for step in (2, 4, 6):
        write_checkpoint(tmp_path, step)
    (tmp_path / "checkpoints" / "step-00000006" / MARK).write_text("{")
    (tmp_path / "checkpoints" / "step-00000004" / MARK).write_text("{")
    save_one(tmp_path, 4)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"step-00000002", "step-00000004"}
    assert loaded(tmp_path) == 4


def test_wherever_the_writer_dies_the_run_goes_on_from_a_whole_checkpoint(tmp_path: Path) -> None:
    """At each file operation of a save in turn, with older checkpoints to drop, and one broken of the same step."""
    torch.set_num_threads(1)
    found, number = [], 1
    while True:
        out = tmp_path / str(number)
        for step in (2, 4):
            write_checkpoint(out, step)
        broken = write_checkpoint(out, 6)
        (broken / MARK).write_text("{")
        killed = killed_at(number, out, lambda out=out: save_one(out, 6))
        found.append(loaded(out))
        save_one(out, 8)  # what the dead one left is in nobody's way
        assert loaded(out) == 8
        assert {path.name for path in (out / "checkpoints").iterdir()} <= {f"step-0000000{n}" for n in (2, 4, 6, 8)}
        shutil.rmtree(out)
        if not killed:
            break
        number += 1
    assert number > 40, "so few file operations make no checkpoint"
    assert found == sorted(found) and set(found) == {4, 6}, "the new one is there from one operation on"


def test_training_goes_on_while_a_checkpoint_is_written_and_the_next_one_waits(tmp_path: Path, monkeypatch) -> None:
    gate, written = threading.Event(), []

    def slowly(path: Path, pieces: list[Piece]) -> str:
        gate.wait(60)
        written.append(path.parent.name[:22])
        return write_pieces(path, pieces)

    monkeypatch.setattr(saving, "write_pieces", slowly)
    with Saver(tmp_path, every=1) as saver:
        saver.save(record_of(2, tmp_path), pieces_of(2))
        saver.check()
        assert not written
        threading.Timer(0.2, gate.set).start()
        saver.save(record_of(4, tmp_path), pieces_of(4))
        assert written[0] == ".partial-step-00000002" and loaded(tmp_path) in (2, 4)
    assert loaded(tmp_path) == 4


def test_what_goes_wrong_in_the_background_ends_the_run_in_one_line_and_the_older_checkpoint_stays(
    tmp_path: Path, monkeypatch
) -> None:
    save_one(tmp_path, 2)

    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    record, pieces, saver = record_of(4, tmp_path), pieces_of(4), Saver(tmp_path, every=1)
    monkeypatch.setattr(os, "pwrite", full)
    saver.save(record, pieces)
    with pytest.raises(
        RunError, match=r"step 4 could not be written: .*cannot be written \(No space left on device\) \(rank 0"
    ):
        saver.wait()
    monkeypatch.undo()
    assert loaded(tmp_path) == 2
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"step-00000002"}


def test_checkpoints_fall_due_by_steps_and_by_minutes(tmp_path: Path) -> None:
    now = 0.0
    by_both = Saver(tmp_path, every=4, minutes=2.0, clock=lambda: now)
    never = Saver(tmp_path, every=0)
    assert [step for step in range(1, 13) if by_both.due(step)] == [4, 8, 12]
    now = 119.0
    assert not by_both.due(5)
    now = 121.0
    assert by_both.due(5) and not never.due(5)
