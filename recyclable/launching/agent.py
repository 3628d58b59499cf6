"""What runs on each host while hosts are looked at: answers one JSON line with another, ends with its input.

`python -m recyclable.launching.agent`, over ssh; `launching/hosts.py` asks.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from recyclable.host import address_towards, addresses
from recyclable.launching.host_report import report

_CONNECT_S = 5
_listening: list[socket.socket] = []


def clock() -> float:
    """Seconds since 1970, as this host has it."""
    return time.time()


def own_address(interface: str | None = None, towards: str | None = None) -> str | None:
    """The address by which this host is known to the others.

    Args:
        interface: its name, where the user says which one ranks use.
        towards: another host, where whoever came here over ssh came from here.
    """
    if interface is not None:
        return next(iter(addresses().get(interface, [])), None)
    reached = os.environ.get("SSH_CONNECTION", "").split()
    if len(reached) == 4 and reached[0] != reached[2] and not reached[2].startswith("127."):
        return reached[2]
    return address_towards(towards or "127.0.0.1")


def listen(address: str | None) -> int:
    """Wait for connections to an address until this process ends; the port."""
    if address is None:
        raise OSError("has no address by which other hosts could reach it")
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listener = socket.create_server((address, 0), family=family, backlog=1024)
    _listening.append(listener)
    return int(listener.getsockname()[1])


def release() -> None:
    """Listen no more: the ports are free again."""
    while _listening:
        _listening.pop().close()


def reach(places: list[tuple[str, int]]) -> list[str | None]:
    """For each (address, port) None, or what the system says against a connection to it."""
    found: list[str | None] = [None] * len(places)

    def one(number: int, address: str, port: int) -> None:
        try:
            socket.create_connection((address, port), timeout=_CONNECT_S).close()
        except OSError as error:
            found[number] = error.strerror or f"no answer in {_CONNECT_S} s"

    threads = [threading.Thread(target=one, args=(number, *place)) for number, place in enumerate(places)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def run(module: str, arguments: list[str], variables: dict[str, str], seconds: float) -> dict[str, Any]:
    """Run a module of recyclable in a process of its own: its last line (JSON), else the last line of its complaint."""
    command = [sys.executable, "-m", module, *arguments]
    try:
        done = subprocess.run(
            command,
            env={**os.environ, **variables},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"problem": f"no end of {module} in {seconds:.0f} s"}
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines() or ["it said nothing"]
    return {"told": json.loads(lines[-1])} if done.returncode == 0 else {"problem": lines[-1]}


ASKED: dict[str, Callable[..., Any]] = {
    **{"clock": clock, "report": report, "own_address": own_address, "listen": listen, "release": release},
    **{"reach": reach, "run": run},
}
"""What may be asked, by name."""


def main() -> int:
    """Answer until the input ends."""
    print(flush=True)  # a line of its own for each answer, whatever the host's .bashrc has begun one with
    for line in sys.stdin:
        question = json.loads(line)
        try:
            answer = {"answer": ASKED[question["ask"]](**question["arguments"])}
        except OSError as error:
            answer = {"problem": str(error)}
        except Exception as error:  # whoever asks can say of which host it is
            answer = {"problem": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
