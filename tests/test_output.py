"""Standard output that nobody takes: lines for people are given up, a result that does not arrive is an error."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from recyclable.cli import main

_SAYS = "from recyclable.output import say; say('one'); say('two')"
_GIVES = "from recyclable.cli import main; import sys; sys.exit(main(['methods']))"


def ended(code: str, out: int) -> tuple[int, str]:
    """Exit status and standard error of a Python program whose standard output is a file's descriptor."""
    done = subprocess.run([sys.executable, "-c", code], stdout=out, stderr=subprocess.PIPE, text=True, timeout=60)
    return done.returncode, done.stderr


@pytest.mark.parametrize("gone", ["a pipe that nobody reads", "a full disk"])
def test_lines_for_people_end_nothing_and_a_result_that_cannot_be_written_is_one_line(gone: str) -> None:
    with Path("/dev/full").open("w") as full, subprocess.Popen(["true"], stdin=subprocess.PIPE) as reader:
        reader.wait()
        assert reader.stdin is not None
        out = full.fileno() if gone == "a full disk" else reader.stdin.fileno()
        assert ended(_SAYS, out) == (0, "")
        status, told = ended(_GIVES, out)
    assert (status, len(told.splitlines())) == (1, 1)
    assert told.startswith("recyclable: error: standard output: cannot be written to (")


def test_a_log_that_can_be_written_again_goes_on(tmp_path: Path) -> None:
    code = f"import os; {_SAYS}; kept = os.open({str(tmp_path / 'log')!r}, os.O_WRONLY | os.O_CREAT); os.dup2(kept, 1)"
    with Path("/dev/full").open("w") as full:
        assert ended(f"{code}; say('three')", full.fileno()) == (0, "")
    assert (tmp_path / "log").read_text() == "three\n"


def test_ctrl_c_at_a_verb_that_cannot_be_gone_on_with_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("recyclable.commands.parts.listing.tell", interrupted)
    assert main(["methods"]) == 1
    assert capsys.readouterr().err == "recyclable: error: ended at once by SIGINT\n"
