"""Where the guardians of all ranks report to: it finds out how a run ends, says why, and has every rank ended."""

from __future__ import annotations

import hmac
import selectors
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import TracebackType

from recyclable.launching import causes
from recyclable.launching.causes import PREEMPTED, Cause, Ending, Where, first, tell
from recyclable.launching.wire import SILENCE_S, Channel, Message, notice_loss

_SETTLE_S = 0.5  # before a cause is told: others may be as much of one
_PATIENCE_S = 5.0  # the same where it looks like a consequence of something not yet heard of
_PATIENCE_HOSTS_S = SILENCE_S + 1  # which may be the loss of a host: others may find it out before the hub does
_GRACE_S = 5.0  # for ranks to end by themselves
_GRACE_PREEMPTED_S = 30.0
_LINGER_S = 30.0  # of ranks that have done everything
_BEGIN_S = 600.0  # between the first rank's beginning and the last one's


@dataclass(eq=False)
class _Member:
    where: Where
    channel: Channel
    word: int | None = None
    """The status that it has said it ends with."""
    gone: bool = False
    lost: bool = False


class Hub:
    """Runs in the loop of a selector whose keys' `data` are callbacks, and is to be asked to `tick` now and then.

    Args:
        address: to listen at; "": all of this host's.
        port: 0: any that is free.
        token: what guardians must know.
        places: host of each rank as messages are to name it; empty: as hosts name themselves.
        world: number of ranks; None: as the first one says.
        say: how a person is told.
    """

    def __init__(
        self,
        selector: selectors.BaseSelector,
        address: str = "127.0.0.1",
        port: int = 0,
        token: str = "",
        *,
        places: Sequence[str] = (),
        world: int | None = None,
        say: Callable[[Ending], None] = tell,
    ) -> None:
        self._selector, self._token, self._places, self._world, self._say = selector, token, places, world, say
        dual = not address and socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual or ":" in address else socket.AF_INET
        self._listener = socket.create_server((address, port), family=family, dualstack_ipv6=dual)
        self._listener.setblocking(False)
        self.port: int = self._listener.getsockname()[1]
        self._strangers: set[Channel] = set()
        self._members: dict[int, _Member] = {}
        self._causes: list[Cause] = []
        self._settled = self._over = self._begun = float("inf")
        self._checkpoint: int | None = None
        self._asked: int | None = None
        self.ending: Ending | None = None
        """Known once it is decided that the run ends."""
        selector.register(self._listener, selectors.EVENT_READ, self._accept)

    def __enter__(self) -> Hub:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._selector.unregister(self._listener)
        self._listener.close()
        for channel in [*self._strangers, *(member.channel for member in self._members.values())]:
            channel.close()

    @property
    def over(self) -> bool:
        """Whether the run has ended and all its ranks are gone, or too much time has passed since they were told."""
        return self.ending is not None and (
            time.monotonic() > self._over or all(member.gone for member in self._members.values())
        )

    @property
    def heard_of_any(self) -> bool:
        """Whether some rank has begun."""
        return bool(self._members)

    @property
    def heard_of_all(self) -> bool:
        """Whether every rank has begun."""
        return self._world is not None and len(self._members) == self._world

    def tick(self) -> None:
        """Decide what time has decided."""
        now = time.monotonic()
        if self.ending is None and now > self._begun + _BEGIN_S and not self.heard_of_all:
            self.blame(Cause(None, f"{self._missing()} did not begin within {_BEGIN_S:.0f} s of the others"))
        if self.ending is None and now > self._settled:
            cause = first(self._causes)
            ending = Ending(cause.status, cause.line(self._checkpoint), cause.traceback, cause.lasting)
            self._end(ending, _GRACE_PREEMPTED_S if cause.status == PREEMPTED else _GRACE_S)

    def preempt(self, number: int, resumes: bool = False) -> None:
        """Ask all ranks to write a checkpoint and end, by a signal.

        Args:
            resumes: whether what no rank has begun can be gone on with as well.
        """
        self._asked = number
        if not self._members:
            self._end(Ending(PREEMPTED if resumes else causes.FAILED, "ended before any rank had begun"), 0)
        self._to_all({"do": "signal", "number": number})

    def interrupt(self) -> None:
        """End all ranks at once."""
        self._end(Ending(causes.FAILED, Cause(None, "ended at once").line(self._checkpoint)), 0)

    def launcher_ended(self, how: str) -> None:
        """Be told that what started the ranks is gone, while some of them have not said that they are done."""
        if self.ending is None and not self._causes:
            missing = f" before {self._missing()} had begun" if not self.heard_of_all else ""
            self.blame(Cause(None, f"deepspeed's launcher {how}{missing}"))

    def blame(self, cause: Cause) -> None:
        """Hear of something that ends the run."""
        if self.ending is not None:
            return  # ranks end because they are told to
        self._causes.append(cause)
        several = len({member.where.host for member in self._members.values()}) > 1
        patience = (_PATIENCE_HOSTS_S if several else _PATIENCE_S) if first(self._causes).second else _SETTLE_S
        self._settled = min(self._settled, time.monotonic() + patience)

    def culprits(self) -> set[int]:
        """Ranks that were killed, stopped or lost."""
        lost = {member.where.rank for member in self._members.values() if member.lost}
        return lost | {cause.where.rank for cause in self._causes if cause.unreliable and cause.where is not None}

    def any_lost(self) -> bool:
        """Whether there are ranks that may still run, on a host that is out of reach."""
        return any(member.lost for member in self._members.values())

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:
            return
        notice_loss(connection)
        channel = Channel(
            self._selector,
            connection,
            lambda message: self._hello(channel, message),
            lambda _: self._strangers.discard(channel),
        )
        self._strangers.add(channel)

    def _hello(self, channel: Channel, message: Message) -> None:
        """A guardian names itself; anybody else is turned away."""
        self._strangers.discard(channel)
        rank, world, host = (message.get(key) for key in ("rank", "world", "host"))
        known = hmac.compare_digest(str(message.get("hello")).encode(), self._token.encode())
        if not (known and type(rank) is int and type(world) is int and 0 <= rank < world) or rank in self._members:
            channel.close()
            return
        if not self._members:
            self._begun = time.monotonic()
        self._world = world
        place = self._places[rank] if rank < len(self._places) else str(host)
        member = self._members[rank] = _Member(Where(rank, place), channel)
        channel.heard = lambda message: self._hear(member, message)
        channel.closed = lambda error: self._lose(member, error)
        channel.send({"do": "go"})
        if self.ending is not None:
            channel.send({"do": "end", "grace": 0})
        elif self._asked is not None:
            channel.send({"do": "signal", "number": self._asked})

    def _hear(self, member: _Member, message: Message) -> None:
        """A guardian tells of its rank."""
        for key, told in message.items():
            match key, told:
                case "step", int():
                    member.where = replace(member.where, step=told)
                case "checkpoint", int():
                    self._checkpoint = told
                case "word", {"status": int(status), "line": str(line), "traceback": str(traceback)}:
                    member.word = status
                    if status:
                        self.blame(causes.said(member.where, status, line, traceback))
                case "gone", {"signal": number, "status": status}:
                    member.gone = True
                    if member.word is None and (number, status) != (None, 0):
                        self.blame(causes.died(member.where, number, status, self._asked))
                case "stopped", int() | float():
                    self.blame(causes.stopped(member.where, told))
                case "orphaned", True:
                    self.blame(causes.orphaned(member.where))
        done = all(each.word == causes.DONE or each.gone for each in self._members.values())
        if done and self.heard_of_all and not self._causes:
            self._end(Ending(causes.DONE), _LINGER_S)

    def _lose(self, member: _Member, error: OSError | None) -> None:
        """A guardian is gone: after its rank, or with all that it knew."""
        if not member.gone and member.word != causes.DONE:
            member.lost = True
            self.blame(causes.lost(member.where, error.strerror if error is not None else None))
        member.gone = True

    def _end(self, ending: Ending, grace: float) -> None:
        """Settle how the run ends, once; where it is no success, have all ranks end within a grace."""
        if self.ending is None:
            self.ending = ending
            if ending.status != causes.DONE:
                self._say(ending)
        self._over = min(self._over, time.monotonic() + grace + SILENCE_S)
        if self.ending.status != causes.DONE:
            self._to_all({"do": "end", "grace": grace})

    def _to_all(self, message: Message) -> None:
        for member in self._members.values():
            if member.channel.open:
                member.channel.send(message)

    def _missing(self) -> str:
        missing = [str(rank) for rank in range(self._world or 0) if rank not in self._members]
        return f"rank {', '.join(missing)}" if missing else "any rank"
