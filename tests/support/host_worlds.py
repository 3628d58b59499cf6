"""A base, a corpus and a task on the own disk of each of several hosts, and runs of the command among them."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

from network_hosts import Host, Switch, recyclable
from worlds import make_base, make_corpus, make_task, write_config

TIMEOUT_S = 600  # on a busy machine; of a quiet one a run takes 20 s
_PRETRAIN = {
    **{"max_steps": 6, "train_batch_size": 8, "max_length": 24, "learning_rate": 5e-3, "dropout": 0.0, "seed": 7},
    **{"eval_every": 6, "save_every": 2, "log_every": 1, "mlm_head": "keep"},
}
_TUNE = {
    **{"tuning": "full", "max_steps": 4, "train_batch_size": 6, "max_length": 24, "learning_rate": 1e-3, "seed": 7},
    **{"eval_every": 4, "save_every": 2, "log_every": 1},
}


class Cluster:
    """Hosts that share nothing of what they read, and everything that they write into `folder`."""

    def __init__(self, folder: Path, hosts: int) -> None:
        self.folder = folder
        made = folder / "made"
        make_base(made / "base")
        make_corpus(made / "corpus")
        make_task(made / "task")
        self.switch = Switch(folder, hosts)
        self.disk = self.switch.disk
        for host in self.switch.hosts:
            shutil.copytree(made, host.own, dirs_exist_ok=True)

    @property
    def hosts(self) -> list[Host]:
        """Whether they are alive or not."""
        return self.switch.hosts

    def run_file(self, name: str, verb: str = "pretrain", folder: Path | None = None, **settings: Any) -> Path:
        """A run config, in the shared directory or in another; its `out` is `folder/name`."""
        common = {"base": self.disk / "base", "out": self.folder / name}
        own = (
            {"corpus": str(self.disk / "corpus"), **_PRETRAIN}
            if verb == "pretrain"
            else {"task": str(self.disk / "task"), **_TUNE}
        )
        return write_config((folder or self.folder) / f"{name}.yaml", {**common, **own, **settings})

    def start(self, *arguments: str | Path, on: int = 0, **environment: str) -> subprocess.Popen[str]:
        """Start the command on a host, by default the first."""
        return self.started(recyclable(*map(str, arguments)), on, **environment)

    def started(self, command: list[str], on: int = 0, **environment: str) -> subprocess.Popen[str]:
        """Start any command there, in the shared directory, with caches on the host's own disk."""
        variables = {
            **{"OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(self.disk / "cache")},
            **{"RECYCLABLE_CACHE": str(self.disk / "cache"), "DS_ACCELERATOR": "cpu", "PYTHONUNBUFFERED": "1"},
            **environment,
        }
        return self.hosts[on].start(command, self.folder, variables)

    def close(self) -> None:
        """All ends."""
        self.switch.close()


def ended(process: subprocess.Popen[str], timeout_s: float = TIMEOUT_S) -> tuple[int, str, str]:
    """Exit status, standard output and the lines of standard error that are no warnings of libraries."""
    try:
        out, err = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        os.kill(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        raise AssertionError(f"no end after {timeout_s} s\n{out}\n{err}") from None
    return process.returncode, out, err
