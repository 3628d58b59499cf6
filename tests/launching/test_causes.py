"""What a person is told at a run's end (which cause that is: test_hub.py)."""

from __future__ import annotations

from recyclable.launching.causes import PREEMPTED, Ending, tell


def test_what_is_told_of_an_end_sends_no_escape_sequence_to_a_terminal(capsys):
    tell(Ending(1, "the task \x1b[2J is no \x9b1m task", "Traceback:\n\tof a \x07 file\n"))
    tell(Ending(PREEMPTED, "ended by SIGTERM"))
    told = "Traceback:\n\tof a ? file\nrecyclable: error: the task ?[2J is no ?1m task\nrecyclable: ended by SIGTERM\n"
    assert capsys.readouterr().err == told
