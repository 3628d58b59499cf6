"""Looks at all hosts of a run before anything is started there: is each reached, like the others, reached by them?"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recyclable.errors import InputError
from recyclable.host import is_here
from recyclable.launching.command import has_others
from recyclable.launching.comparing import Finding, compare
from recyclable.launching.exports import exports
from recyclable.launching.hostfile import read_hostfile
from recyclable.launching.hosts import Hosts

_INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
_SMALL = 1 << 20
_OF_THE_FIRST = ("--hostfile", "--out", "--plot")  # options with files that no rank reads, or rank 0 alone writes


@dataclass
class Checked:
    """What was found."""

    findings: list[Finding] = field(default_factory=list)
    reports: dict[str, Any] = field(default_factory=dict)
    skews: dict[str, float] = field(default_factory=dict)
    address: str | None = None
    """Of the first host, as the others reach it."""
    port: int | None = None
    """A free one there."""

    def require_right(self, where: object) -> None:
        """InputError, in a line, where a host is so wrong that a run would not do."""
        if grave := [str(finding) for finding in self.findings if finding.grave]:
            more = f" (and {len(grave) - 1} more: `recyclable doctor --hostfile {where}`)" if len(grave) > 1 else ""
            raise InputError(where, grave[0] + more)


def check(hosts: Hosts, slots: Mapping[str, int], files: Iterable[str] = (), folders: Iterable[str] = ()) -> Checked:
    """Ask hosts about themselves, and try the ways between them.

    Args:
        slots: host -> ranks it is to have.
        files: small files that every host must have alike.
        folders: where a run writes.
    """
    reports = hosts.ask("report", files=list(files), folders=list(folders))
    found = Checked(reports=reports, skews=hosts.skews())
    found.findings += compare(reports, found.skews, slots)
    if has_others(slots):
        _ways(hosts, found)
    found.findings[:0] = [Finding(host, why) for host, why in hosts.silent.items()]
    return found


def before_start(hostfile: str | Path, named: Iterable[str], nproc: int | None = None) -> Checked:
    """Look at the hosts of a run that is about to start; InputError, in one line, naming the one that is wrong.

    Args:
        named: the words of its command line: small files that ranks read must be the same on every host.
        nproc: ranks per host; None: the hostfile's slots.
    """
    slots = {host: nproc or own for host, own in read_hostfile(hostfile).items()}
    with Hosts(slots, exports(os.environ)) as hosts:
        found = check(hosts, slots, read_by_ranks(named))
    found.require_right(hostfile)
    return found


def read_by_ranks(named: Iterable[str]) -> Iterator[str]:
    """The small files among the words of a command line that ranks read."""
    words = iter(named)
    for word in words:
        # options may be shortened; `--` alone ends them
        if len(word) > len("--") and any(option.startswith(word) for option in _OF_THE_FIRST):
            next(words, None)
        elif _is_small_file(word):
            yield word


def _is_small_file(word: str) -> bool:
    try:
        return Path(word).is_file() and Path(word).stat().st_size <= _SMALL
    except (OSError, ValueError):  # too long for a name, for example
        return False


def _ways(hosts: Hosts, found: Checked) -> None:
    """Whether every host reaches every other; the first one's address, and a free port there."""
    first = hosts.names[0]
    other = next((host for host in hosts.answering if not is_here(host)), None)
    addresses = hosts.ask_each(
        "own_address", lambda host: {"interface": _chosen(found.reports[host]), "towards": other}
    )
    ports = hosts.ask_each("listen", lambda host: {"address": addresses[host]})
    places = {host: (addresses[host], port) for host, port in ports.items()}
    asked = list(places)
    answers = hosts.ask_each("reach", lambda _: {"places": [places[host] for host in asked]})
    against = {host: dict(zip(asked, answer, strict=True)) for host, answer in answers.items()}
    for host in asked:
        others = {other: problems[host] for other, problems in against.items() if other != host}
        blind = {other: problem for other, problem in others.items() if problem is not None}
        if not blind:
            continue
        who = "no other host reaches it" if len(blind) == len(others) else f"{', '.join(blind)} cannot reach it"
        why = next(iter(blind.values()))
        text = f"{who} at {places[host][0]} ({why}): a firewall, or another interface to use (GLOO_SOCKET_IFNAME)?"
        found.findings.append(Finding(host, text))
    hosts.ask("release")
    if first in places:
        found.address, found.port = places[first]


def _chosen(report: Mapping[str, Any]) -> str | None:
    """The interface that the user has named for ranks of a host, if it is there."""
    named = (report["chosen_interfaces"].get(variable) for variable in _INTERFACES)
    return next((name for name in named if name in report["interfaces"]), None)
