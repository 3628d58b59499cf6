"""`recyclable doctor`: what this host, or the hosts of a hostfile, can run, and which of them is wrong."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from socket import gethostname
from typing import Any

from recyclable.config.run_file import read_run_file
from recyclable.data.packing import cache_root
from recyclable.host import free_port, on_cpu
from recyclable.launching.checking import Checked, check
from recyclable.launching.comparing import Finding
from recyclable.launching.exports import exports
from recyclable.launching.hostfile import read_hostfile
from recyclable.launching.hosts import Hosts

_TRIAL_S = 300  # torch alone takes up to a minute to import from a slow disk; bases are hashed as well


def doctor(
    hostfile: str | None, run: str | None = None, overrides: list[str] | None = None, ds_config: str | None = None
) -> dict[str, Any]:
    """Look at every host, at the ways between them, and try an all-reduce.

    Args:
        hostfile: None is this host alone.
        run: a run config, whose inputs are compared, with `overrides` over it; `ds_config`: its ds_config's file.

    Returns `hosts` (name -> report), `trial` (name -> what `recipes.trial` found there), `findings`, and `right`.
    """
    slots = {gethostname(): 1} if hostfile is None else read_hostfile(hostfile)
    files = [file for file in (run, ds_config) if file is not None and Path(file).is_file()]
    folders = [tempfile.gettempdir(), str(cache_root())]
    if run is not None and "out" in (content := read_run_file(run, overrides or [])):
        folders.append(str(content["out"]))
    variables = exports(os.environ) | ({"DS_ACCELERATOR": "cpu"} if on_cpu() else {})
    with Hosts(slots, variables) as hosts:
        found = check(hosts, slots, files, folders)
        if any(finding.grave for finding in found.findings):
            tried = {}  # it would wait for hosts that do not come
        else:
            tried = _tried(hosts, found, [] if run is None else [run, *(overrides or [])])
    return {
        "hosts": {host: {**report, "clock_ahead_s": found.skews.get(host)} for host, report in found.reports.items()},
        "trial": tried,
        "findings": [vars(finding) for finding in found.findings],
        "right": not any(finding.grave for finding in found.findings),
    }


def _tried(hosts: Hosts, found: Checked, arguments: list[str]) -> dict[str, Any]:
    """What a rank on each host found; adds to the findings."""
    place = {"MASTER_ADDR": found.address or "127.0.0.1", "MASTER_PORT": str(found.port or free_port())}
    numbers = {host: number for number, host in enumerate(hosts.names)}

    def asked(host: str) -> dict[str, Any]:
        ranks = {"RANK": str(numbers[host]), "WORLD_SIZE": str(len(numbers)), "LOCAL_RANK": "0", "LOCAL_SIZE": "1"}
        variables = {**place, **ranks}
        question = {"module": "recyclable.recipes.trial", "arguments": arguments, "variables": variables}
        return {**question, "seconds": _TRIAL_S}

    answers = hosts.ask_each("run", asked, _TRIAL_S + 30)
    found.findings += [Finding(host, f"in the trial: {why}") for host, why in hosts.silent.items()]
    told = {}
    for host, answer in answers.items():
        if "problem" in answer:
            found.findings.append(Finding(host, f"in the trial: {answer['problem']}"))
            continue
        told[host] = answer["told"]
        if not told[host]["right"]:
            found.findings.append(Finding(host, "the sums of all-reduces are wrong there"))
    if wrong := next((each["run"] for each in told.values() if each["run"]), None):
        found.findings.append(Finding("run", wrong))
    return told
