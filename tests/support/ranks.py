"""What one rank does in test_launcher.py, by its first argument."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from recyclable.launching import guard

RANK = int(os.environ["RANK"])


def say(line: str) -> None:
    """One write, end of line included: `print` makes two, between which another rank's line may come."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def together() -> int:
    """Every collective, each against the value worked out by hand; then bad input that only rank 0 sees."""
    import torch

    from recyclable import distributed as d
    from recyclable.errors import InputError

    d.init()
    d.init()
    assert (d.rank(), d.world_size(), d.is_main()) == (RANK, 2, RANK == 0)
    assert torch.get_num_threads() == int(os.environ["OMP_NUM_THREADS"])
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.int64):
        tensor = torch.tensor([RANK + 1, 10 * RANK], dtype=dtype)
        assert d.sum_over_ranks(tensor) is tensor
        assert tensor.tolist() == [3, 10], (dtype, tensor)
    tiny = torch.tensor(1.0 if RANK else 2.0**-50, dtype=torch.float64)
    assert d.sum_over_ranks(tiny).item() == 1 + 2.0**-50  # fp32 would have lost it
    strided = torch.zeros(2, 2)
    d.sum_over_ranks(strided.t()[0].fill_(RANK))
    assert strided.tolist() == [[1, 0], [1, 0]]
    assert d.broadcast_object({"from": RANK}) == {"from": 0}
    board = d.Board()
    board.post(f"from {RANK}", f"note {RANK}")
    assert board.read(f"from {1 - RANK}", 30) == f"note {1 - RANK}"
    try:
        board.read("nothing", 0.05)
        raise AssertionError("a note came that nobody left")
    except TimeoutError:
        pass
    assert d.agreed(lambda: RANK + 1) == RANK + 1
    for failing in (0, 1):
        try:
            d.agreed(lambda failing=failing: Path("missing").stat() if failing == RANK else 0)
            raise AssertionError("one rank's failure is every rank's")
        except InputError as error:
            assert str(error) == "missing: cannot be read (No such file or directory)"
    d.barrier()
    with d.main_first():
        if d.is_main():
            Path("made").write_text("by rank 0")
        assert Path("made").read_text() == "by rank 0"
    try:
        with d.main_first():
            assert d.is_main(), "a body ran after rank 0 failed"
            raise ValueError("broken\nover two lines")
    except ValueError:
        assert d.is_main()
    except RuntimeError as error:
        assert not d.is_main() and "ValueError: broken\nover two lines" in str(error)
    with d.main_first(RANK) as leads:  # as hosts whose disks are their own: at the same time
        assert leads
        board.post(f"began {RANK}", "")
        board.read(f"began {1 - RANK}", 60)
    d.barrier()  # rank 0 has the store, and is about to leave
    try:
        with d.main_first(RANK):
            Path(f"made apart by {RANK}").touch()
            if d.is_main():
                raise ValueError("rank 0's")
    except ValueError:
        assert d.is_main()
    except RuntimeError as error:
        assert not d.is_main() and str(error) == "rank 0 failed: ValueError: rank 0's"
        assert Path("made apart by 1").exists()
    else:
        raise AssertionError("rank 0's failure is every rank's")
    d.barrier()
    say(f"rank {d.rank()} of {d.world_size()} passed {sys.argv[1:]}")
    try:
        with d.main_first():
            raise InputError("task.yaml", "is wrong")
    except InputError as error:
        say(f"rank {RANK}: {error}")
        return error.exit_status
    finally:
        d.shutdown()
        d.shutdown()
        assert d.world_size() == 1
    return 0


def hello() -> int:
    say(f"hello from {RANK}")
    return 0


def die() -> int:
    if RANK == 1:  # as the kernel does when memory runs out
        os.kill(os.getpid(), signal.SIGKILL)
    return wait()  # the other one would never end by itself


def wait() -> int:
    """Train for ever."""
    Path("pid.tmp" + str(RANK)).write_text(str(os.getpid()))
    os.replace(f"pid.tmp{RANK}", f"pid{RANK}")
    while True:
        time.sleep(1)


def asleep() -> int:
    """Rank 1 was stopped as soon as it was there."""
    return wait()


if __name__ == "__main__":
    if sys.argv[1] == "asleep" and RANK == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    guard.begin()
    sys.exit(globals()[sys.argv[1]]())
