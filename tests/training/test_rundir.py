"""A run's directory: what cannot be made or is damaged is refused in one line, and nothing of the trial stays."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from recyclable.config.settings import Settings
from recyclable.errors import InputError
from recyclable.training import checkpoint, rundir


@pytest.mark.parametrize("place", ["/proc/foo/x", "/dev/null/x", "{tmp}/a\0b", "{tmp}/" + "x" * 300])
@pytest.mark.parametrize("claims", [True, False])
def test_a_directory_that_cannot_be_made_is_refused(place: str, claims: bool, tmp_path: Path) -> None:
    folder = Path(place.replace("{tmp}", str(tmp_path)))
    with pytest.raises(InputError, match=r"^out: .* cannot be used \(.+\), expected a directory"):
        if claims:
            rundir.claim(Settings(), folder, "manifest.json", resume=False)
        else:
            rundir.require_writable("out", folder)
    assert not list(tmp_path.iterdir())


def test_trying_a_directory_leaves_none(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    for folder in (tmp_path / "there", tmp_path / "there" / "new", tmp_path / "far" / "off"):
        rundir.require_writable("out", folder)
    assert list(tmp_path.rglob("*")) == [tmp_path / "there"]


@pytest.mark.parametrize("text", ["[]", '"x"', "null", "{}", "{", "\xff"])
def test_a_damaged_record_of_the_run_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_bytes(text.encode("latin1"))
    with pytest.raises(InputError, match=r"run\.json: (broken JSON|is empty)"):
        rundir.claim(Settings(), tmp_path, "manifest.json", resume=True)


@pytest.mark.parametrize("text", ["[]", "null", "{}", '{"files": []}', '{"files": {}}', "{"])
def test_a_damaged_list_of_a_checkpoint_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "step-00000001").mkdir()
    (tmp_path / "step-00000001" / "complete.json").write_text(text)
    engine: Any = SimpleNamespace()  # the list is refused before anything is asked of it
    with pytest.raises(InputError, match=r"complete\.json: (broken JSON|files is .* expected the checkpoint's files)"):
        checkpoint.load_latest(engine, tmp_path)
