"""Asks all hosts of a hostfile at once: an `agent` on each over ssh; beside this process where there is no other."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, TypeVar

from recyclable.host import is_here

T = TypeVar("T")
_ANSWER_S = 30
_SSH = ("-oBatchMode=yes", "-oConnectTimeout=10", "-x")


class Silent(Exception):
    """A host that does not answer; the message says why, as far as that is known."""


class Agent:
    """The process that answers on one host."""

    def __init__(self, host: str, variables: Mapping[str, str], by_ssh: bool) -> None:
        self.host = host
        command = [sys.executable, "-m", "recyclable.launching.agent"]
        own = os.pathsep.join(filter(None, (os.getcwd(), os.environ.get("PYTHONPATH"))))
        environment = {**variables, "PYTHONPATH": own}  # as deepspeed's launcher gives it
        if by_ssh:
            words = [f"{name}={value}" for name, value in environment.items()]
            line = f"cd {shlex.quote(os.getcwd())} && exec env {shlex.join([*words, *command])}"
            # The options that pdsh will be given, so that what is tried here is what will be done there.
            options = shlex.split(os.environ.get("PDSH_SSH_ARGS_APPEND", ""))
            command = ["ssh", *_SSH, *options, host, line]
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self._process = subprocess.Popen(
            command,
            env={**os.environ, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            start_new_session=True,  # Ctrl-C is for the command alone
        )
        self._begun = b""  # a line that has not ended yet
        self._aside = b""  # the last one that was no answer

    def ask(self, name: str, timeout_s: float = _ANSWER_S, **arguments: Any) -> Any:
        """The answer; raises `Silent`."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps({"ask": name, "arguments": arguments}).encode() + b"\n")
            self._process.stdin.flush()
        found = self._answer(timeout_s)
        if "problem" in found:
            raise Silent(found["problem"])
        return found["answer"]

    def _answer(self, timeout_s: float) -> dict[str, Any]:
        """The next line that an agent says; others are of the host's .bashrc and the like."""
        assert self._process.stdout is not None
        end = time.monotonic() + timeout_s
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while selector.select(max(0, end - time.monotonic())):
                if not (more := os.read(self._process.stdout.fileno(), 1 << 16)):
                    raise Silent(self._last_words())
                *lines, self._begun = (self._begun + more).split(b"\n")
                for line in lines:
                    if (found := _of_agent(line)) is not None:
                        return found
                    self._aside = line.strip() or self._aside
        raise Silent(f"does not answer within {timeout_s:.0f} s")

    def _last_words(self) -> str:
        """What it said before it ended."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        self._errors.seek(0)
        said = [self._aside.decode(errors="replace"), *self._errors.read().strip().splitlines()][-1]
        return f"cannot be used over ssh: {said}" if said else "ended without a word over ssh"

    def end(self) -> None:
        """It ends with its input."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(2)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._errors.close()


class Hosts:
    """All of them; those that fall silent are left out from then on, with the reason in `silent`."""

    def __init__(self, hosts: Iterable[str], variables: Mapping[str, str] | None = None) -> None:
        self.names = list(hosts)
        self.silent: dict[str, str] = {}
        self._variables = variables or {}
        self._agents: dict[str, Agent] = {}
        self._pool = ThreadPoolExecutor(max(1, len(self.names)))

    def __enter__(self) -> Hosts:
        try:
            # pdsh goes to this host over ssh as well where there are others
            by_ssh = len(self.names) > 1 or not all(map(is_here, self.names))
            self._agents = {host: Agent(host, self._variables, by_ssh) for host in self.names}
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        list(self._pool.map(Agent.end, self._agents.values()))
        self._pool.shutdown()

    @property
    def answering(self) -> list[str]:
        """Those that have answered so far."""
        return [host for host in self.names if host not in self.silent]

    def ask(self, name: str, timeout_s: float = _ANSWER_S, **arguments: Any) -> dict[str, Any]:
        """Ask every one the same at the same time; host -> answer."""
        return self.ask_each(name, lambda _: arguments, timeout_s)

    def ask_each(
        self, name: str, arguments_of: Callable[[str], Mapping[str, Any]], timeout_s: float = _ANSWER_S
    ) -> dict[str, Any]:
        """Ask every one at the same time, with arguments of its own."""

        return self._each(lambda host: self._agents[host].ask(name, timeout_s, **arguments_of(host)))

    def skews(self) -> dict[str, float]:
        """Host -> seconds that its clock is ahead of this host's, to half of what a question takes."""

        def one(host: str) -> float:
            before = time.time()
            theirs = self._agents[host].ask("clock")
            return theirs - (before + time.time()) / 2

        return self._each(one)

    def _each(self, ask: Callable[[str], T]) -> dict[str, T]:
        """What is answered by those who do; the others are left out from now on."""

        def one(host: str) -> tuple[str, T] | None:
            try:
                return host, ask(host)
            except Silent as why:
                self.silent[host] = str(why)
                return None

        found = dict(filter(None, self._pool.map(one, self.answering)))
        self.silent = {host: self.silent[host] for host in self.names if host in self.silent}  # not by who was first
        return found


def _of_agent(line: bytes) -> dict[str, Any] | None:
    """What an agent has answered; None where somebody else wrote that line."""
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) and found.keys() & {"answer", "problem"} else None
