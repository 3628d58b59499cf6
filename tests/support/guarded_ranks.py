"""Ranks that import nothing large, for tests of what guards them: `guarded_ranks.py CASE` does what CASE says."""

from __future__ import annotations

import os
import signal
import sys
import time

from recyclable.errors import Preempted
from recyclable.launching import guard, preemption

RANK, CASE = int(os.environ["RANK"]), sys.argv[1]
LONG_S = 60
ODD = {
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "crashed": lambda: os.kill(os.getpid(), signal.SIGSEGV),
    "stopped": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "left": lambda: os._exit(3),
    "bad": lambda: ended(2, "task.yaml: is wrong"),
    "raised": lambda: ended(1, "ValueError: no", "Traceback\nValueError: no\n"),
    "unguarded": lambda: os.kill(guard._guardian[1].pid, signal.SIGKILL),
    "stubborn": lambda: os.kill(os.getpid(), signal.SIGKILL),
}
"""What rank 1 does after its third step; rank 0 goes on."""


def ended(status: int, line: str = "", traceback: str = "") -> None:
    guard.last_word(status, line, traceback)
    sys.exit(status)


def main() -> None:
    sys.stdout.write(f"{os.getpid()}\n")
    sys.stdout.flush()
    guard.begin(every=True)
    guard.begin(every=True)
    guard.tell(step=3)
    if CASE == "silent":  # a script that knows of no guardian's last word
        return
    if CASE == "done":
        ended(0)
    if CASE == "checkpoint":
        guard.tell(checkpoint=2)
    if CASE == "consequence" and RANK == 0:  # it notices before anybody else that rank 1 will be gone
        guard.last_word(1, "RuntimeError: Connection closed by peer", "Traceback of rank 0\n")
    if CASE == "outlives" and RANK == 1:  # it takes its time to end
        guard.last_word(75, "asked to")
        time.sleep(6)
        sys.exit(75)
    if CASE == "outlives":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(3)
        os.kill(guard._guardian[1].pid, signal.SIGKILL)
    time.sleep(0.3)
    if CASE in ("consequence", "checkpoint") and RANK == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if RANK == 1 and CASE in ODD:
        ODD[CASE]()
    if CASE == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(LONG_S)


if CASE == "asked":
    try:
        with preemption.heeded():
            main()
    except Preempted as error:
        ended(error.exit_status, str(error))
else:
    main()
