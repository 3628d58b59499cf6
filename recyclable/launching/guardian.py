"""A small process beside each rank, its child: tells the hub what becomes of the rank, and ends it when it is told to.

It is started before the rank imports anything large, uses the standard library alone, and ends with its rank. Neither a
rank that is stopped nor one that is stuck in a collective keeps it from its work.
"""

from __future__ import annotations

import os
import selectors
import signal
import socket
import sys
import threading
import time
from contextlib import suppress

from recyclable.launching import causes
from recyclable.launching.causes import Cause, Ending, Where
from recyclable.launching.hub import Hub
from recyclable.launching.process import command_of, end_of, exit_handle, is_stopped, state_of
from recyclable.launching.watch import HERE, Watch, of_environment
from recyclable.launching.wire import Channel, Message, notice_loss

_TICK_S = 0.5
_STOPPED_S = 10.0  # then a rank that is stopped is given up
_LINGER_S = 20.0  # the same for one that has said its last word
_LINGER_DONE_S = 120.0  # and for one that is done, which a launcher would take for a failure if it was ended
_LAST_S = 3.0  # for the last word of a rank that hardly began
_REACH_S = 20.0  # how long a command's hub may be out of reach
_IGNORED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_GO = {"do": "go"}
_LAUNCHER = "deepspeed.launcher.launch"


class Guardian:
    """Of one rank.

    Args:
        pid: the rank, this process's parent unless it is gone already.
        rank_side: connected to it.
    """

    def __init__(self, pid: int, rank_side: socket.socket, watch: Watch) -> None:
        self._pid, self._watch = pid, watch
        self._where = Where(int(os.environ["RANK"]), socket.gethostname())
        self._selector = selectors.DefaultSelector()
        self._words = Channel(self._selector, rank_side, self._hear_rank, lambda _: None)
        state = state_of(self._pid)
        self._launcher = state.parent if state is not None and _LAUNCHER in command_of(state.parent) else None
        self._hub: Channel | None = None
        self._joined = self._alone = False
        self._unsent: list[Message] = []
        self._reached: socket.socket | OSError | None = None  # what the thread has found
        self._step: int | None = None
        self._word: Ending | None = None
        self._told: set[str] = set()
        self._stopped_since: float | None = None
        self._kill_at = float("inf")

    def run(self) -> None:
        """Until the rank is gone and all is told."""
        own = self._own_hub()
        reached, reaching = socket.socketpair()
        self._selector.register(reached, selectors.EVENT_READ, lambda: self._join(reached))
        threading.Thread(target=self._reach, args=(reaching,), daemon=True).start()
        if not self._watch.commanded:
            self._words.send(_GO)  # its hub may begin later
        if (handle := exit_handle(self._pid)) is not None:
            self._selector.register(handle, selectors.EVENT_READ, lambda: self._selector.unregister(handle))
        while os.getppid() == self._pid:
            self._turn(own)
            self._look()
        self._report_end(own)
        while own is not None and own.heard_of_any and not own.over:  # else nobody reaches it, and it will know nothing
            self._turn(own)

    def _turn(self, own: Hub | None, wait: float = _TICK_S) -> None:
        for key, _ in self._selector.select(wait):
            key.data()
        self._tell_step()
        if own is not None:
            own.tick()

    def _own_hub(self) -> Hub | None:
        """Rank 0's, where no command has one."""
        if self._watch.commanded or self._where.rank != 0:
            return None
        address = self._watch.addresses[0]
        try:
            return Hub(self._selector, HERE if address in (HERE, "localhost") else "", self._watch.port)
        except OSError as error:
            problem = f"port {self._watch.port} is taken ({error.strerror}), so nobody watches over the ranks"
            with suppress(OSError, ValueError):  # nobody can be told
                print(f"recyclable: notice: {problem}", file=sys.stderr, flush=True)
            return None

    # ---- the hub -------------------------------------------------------------------------------------------------

    def _reach(self, reaching: socket.socket) -> None:
        """In a thread: connect to the hub, which may begin later than this rank where no command has it.

        Closing the socket says that it is done.
        """
        with reaching:
            self._reached = self._tried()

    def _tried(self) -> socket.socket | OSError:
        begun, problem = time.monotonic(), OSError("nothing was tried")
        while not self._watch.commanded or time.monotonic() < begun + _REACH_S:
            for address in self._watch.addresses:
                try:
                    return socket.create_connection((address, self._watch.port), timeout=5)
                except OSError as error:
                    problem = error
            time.sleep(0.5)
        return problem

    def _join(self, reached: socket.socket) -> None:
        """Take what the thread has found."""
        self._selector.unregister(reached)
        reached.close()
        found = self._reached
        if isinstance(found, socket.socket):
            notice_loss(found)
            self._hub = Channel(self._selector, found, self._hear_hub, self._lose_hub)
            world = int(os.environ["WORLD_SIZE"])
            self._hub.send(
                {"hello": self._watch.token, "rank": self._where.rank, "world": world, "host": self._where.host}
            )
        else:
            problem = found.strerror or found if found is not None else "an error"
            places = " or ".join(f"{address}:{self._watch.port}" for address in self._watch.addresses)
            self._give_up(f"cannot reach the command that started it at {places} ({problem})")

    def _hear_hub(self, message: Message) -> None:
        match message:
            case {"do": "go"} if self._hub is not None:
                self._joined = True
                if self._watch.commanded:
                    self._words.send(_GO)
                for each in self._unsent:
                    self._hub.send(each)
            case {"do": "signal", "number": int(number)}:
                self._signal(number)
            case {"do": "end", "grace": int() | float() as grace}:
                self._kill_at = min(self._kill_at, time.monotonic() + grace)
                if not grace:
                    self._signal(signal.SIGKILL)
                elif self._word is None:  # else it is about to end, with a status of its own
                    self._signal(signal.SIGTERM)

    def _lose_hub(self, error: OSError | None) -> None:
        if self._joined:
            who = "the command that started it" if self._watch.commanded else "rank 0's host"
            self._give_up(f"lost {who} ({error.strerror if error is not None else 'it was ended'})")
        elif self._watch.commanded:  # it ended as this rank began
            self._alone, self._hub, self._kill_at = True, None, 0.0
        else:  # a stranger has that port
            self._hub = None

    def _give_up(self, what: str) -> None:
        """Nobody is there any more to say what is to be done."""
        self._joined, self._hub, self._alone = False, None, True
        # one that has been asked to end and is about to: schedulers may end rank 0's guardian with the rest of its host
        if self._word is None or self._word.status not in (causes.DONE, causes.PREEMPTED):
            if int(os.environ.get("LOCAL_RANK", "0")) == 0:  # once for each host
                self._tell_step()
                causes.tell(Ending(causes.FAILED, Cause(self._where, what).line()))
            self._kill_at = 0.0

    def _send(self, message: Message) -> None:
        if self._joined and self._hub is not None:
            self._hub.send(message)
        else:
            self._unsent.append(message)

    # ---- the rank ------------------------------------------------------------------------------------------------

    def _hear_rank(self, message: Message) -> None:
        """What the rank tells is passed on; of steps the last."""
        if "step" in message:
            self._step = message["step"]
            return
        self._tell_step()
        if "word" in message:
            word = message["word"]
            self._word = Ending(word["status"], word["line"], word["traceback"])
            linger = _LINGER_DONE_S if self._word.status == causes.DONE else _LINGER_S
            self._kill_at = min(self._kill_at, time.monotonic() + linger)
        self._send(message)

    def _tell_step(self) -> None:
        if self._step is not None:
            self._where = Where(self._where.rank, self._where.host, self._step)
            self._send({"step": self._step})
            self._step = None

    def _look(self) -> None:
        """See how the rank is."""
        now, state = time.monotonic(), state_of(self._pid)
        if now > self._kill_at:
            self._signal(signal.SIGKILL)
        if state is None or state.letter in "ZX":
            return
        if self._launcher is not None and state.parent != self._launcher:
            self._tell_once({"orphaned": True})
        # a person who stops the launcher as well, by Ctrl-Z, means to go on
        if state.letter != "T" or (self._launcher is not None and is_stopped(self._launcher)):
            self._stopped_since = None
        else:
            self._stopped_since = self._stopped_since or now
            if now > self._stopped_since + _STOPPED_S:
                self._tell_once({"stopped": round(now - self._stopped_since)})

    def _tell_once(self, message: Message) -> None:
        key = next(iter(message))
        if key not in self._told:
            self._told.add(key)
            self._tell_step()
            self._send(message)

    def _signal(self, number: int) -> None:
        if os.getppid() == self._pid:  # else it is gone, and its number may be another's
            with suppress(OSError):
                os.kill(self._pid, number)

    def _report_end(self, own: Hub | None) -> None:
        """The rank is gone: tell the hub how, or a person where there is no hub."""
        number, status = end_of(self._pid)
        patience = time.monotonic() + _LAST_S
        self._turn(own, 0)  # hear what the rank said last
        while not self._joined and not self._alone and time.monotonic() < patience:
            self._turn(own)
        self._send({"gone": {"signal": number, "status": status}})
        if self._joined and self._hub is not None:
            if own is None:
                self._hub.finish()
        elif not self._alone:
            word = self._word or Ending(causes.FAILED, causes.died(self._where, number, status).line())
            if word.status != causes.DONE and (self._word is not None or status != causes.DONE):
                causes.tell(word)


def main() -> None:
    """Guard the parent, whose socket is standard input."""
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    with socket.socket(fileno=0) as rank_side:
        Guardian(int(sys.argv[1]), rank_side, of_environment()).run()


if __name__ == "__main__":
    main()
