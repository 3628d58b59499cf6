"""Lines of JSON over a socket, between a rank, its guardian and the hub; the kernel notices a loss of the other side.

No host is asked whether it is alive: kernels answer for their processes, also for one that is stopped or busy, and a
connection that the kernel gives up is a host or a network that is gone.
"""

from __future__ import annotations

import json
import selectors
import socket
from collections.abc import Callable
from contextlib import suppress
from typing import Any

Message = dict[str, Any]
_IDLE_S, _BETWEEN_S, _TRIES = 4, 4, 3
SILENCE_S = _IDLE_S + _BETWEEN_S * _TRIES
"""So long after the last sign of a host it is given up."""
_GOODBYE_S = 2.0
_MOST = 1 << 20  # bytes of a line; nobody here sends as many


def line(message: Message) -> bytes:
    """A message as it is sent."""
    return json.dumps(message).encode() + b"\n"


def notice_loss(connection: socket.socket) -> None:
    """Have the kernel end a TCP connection within `SILENCE_S` of the other host's last sign."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (
        ("TCP_KEEPIDLE", _IDLE_S),
        ("TCP_KEEPINTVL", _BETWEEN_S),
        ("TCP_KEEPCNT", _TRIES),
        ("TCP_USER_TIMEOUT", 1000 * SILENCE_S),  # else what was sent and not answered is sent again for minutes
    ):
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


class Channel:
    """A connection of a selector's loop, whose callbacks are `data` of its keys.

    Args:
        heard: called with each message.
        closed: called once, when the other side is gone, with what the system says of it (None: it ended).
    """

    def __init__(
        self,
        selector: selectors.BaseSelector,
        connection: socket.socket,
        heard: Callable[[Message], None],
        closed: Callable[[OSError | None], None],
    ) -> None:
        self._selector, self._connection, self.heard, self.closed = selector, connection, heard, closed
        self._rest, self.open = b"", True
        connection.setblocking(False)
        selector.register(connection, selectors.EVENT_READ, self._read)

    def send(self, message: Message) -> None:
        """Send a message; what can no more be sent is found out by reading."""
        with suppress(OSError):
            self._connection.sendall(line(message))

    def close(self) -> None:
        """End it from here; twice is once."""
        if self.open:
            self.open = False
            self._selector.unregister(self._connection)
            self._connection.close()

    def finish(self) -> None:
        """End it once the other side has everything."""
        with suppress(OSError):
            self._connection.shutdown(socket.SHUT_WR)
            self._connection.settimeout(_GOODBYE_S)
            while self._connection.recv(1 << 16):  # closed with something unread, it would take what was sent along
                pass
        self.close()

    def _read(self) -> None:
        try:
            data, error = self._connection.recv(1 << 16), None
        except BlockingIOError:
            return
        except OSError as problem:
            data, error = b"", problem
        *lines, self._rest = (self._rest + data).split(b"\n")
        for each in lines:
            self._hear(each)
        if self.open and (not data or len(self._rest) > _MOST):
            self.close()
            self.closed(error)

    def _hear(self, text: bytes) -> None:
        """Strangers may send anything: what is no message is not heard."""
        message = None
        with suppress(ValueError, RecursionError):
            message = json.loads(text)
        if isinstance(message, dict) and self.open:
            self.heard(message)
