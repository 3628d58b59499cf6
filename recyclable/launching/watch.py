"""What ranks find in their environment of the command that started them: where its hub listens, how often it tried."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable
from dataclasses import dataclass

from recyclable.host import address_towards

VARIABLE = "RECYCLABLE_WATCH"
RESTART = "RECYCLABLE_RESTART"
"""Set where ranks are started again, as they failed before."""
HERE = "127.0.0.1"


@dataclass(frozen=True)
class Watch:
    """Where a hub is found.

    `addresses` are those of its host, any of which may be out of reach. A hub that is `commanded` belongs to the
    command that started the ranks, any other to the guardian of rank 0.
    """

    addresses: tuple[str, ...]
    port: int
    token: str
    commanded: bool = True

    def __str__(self) -> str:
        return ",".join([str(self.port), self.token, *self.addresses])  # no shell has a use for these


def of_environment() -> Watch:
    """The command's hub, where the environment names one, else rank 0's guardian's, beside torch's own port there."""
    if VARIABLE in os.environ:
        port, token, *addresses = os.environ[VARIABLE].split(",")
        client = os.environ.get("SSH_CONNECTION", "").split()[:1]  # who came over ssh is the command
        return Watch((*addresses, *client), int(port), token)
    torchs = int(os.environ["MASTER_PORT"])
    beside = torchs + 1 if torchs < 65535 else torchs - 1
    return Watch((os.environ["MASTER_ADDR"],), beside, "", commanded=False)


def own_addresses(hosts: Iterable[str]) -> tuple[str, ...]:
    """What other hosts may reach this one by: the addresses that it shows them, its name, its own."""
    shown = filter(None, map(address_towards, hosts))
    return tuple(dict.fromkeys([*shown, socket.gethostname(), HERE]))
