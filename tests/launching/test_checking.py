"""What is asked of hosts before a run starts there: two names of this machine, behind a stand-in for ssh."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from processes import LAUNCHER_VARIABLES, ROOT

from recyclable.errors import InputError
from recyclable.launching.checking import before_start
from recyclable.launching.hosts import Agent, Silent

FIRST, SECOND = "localhost", "127.0.0.1"
# As sshd: a shell of the user's, which says something before it runs the line, in a directory of the host's own.
_SSH = """#!/bin/sh
while case $1 in -*) true ;; *) false ;; esac; do shift; done
printf 'Welcome!\\n\\n{"a": "message of the day"}\\n"answer"\\n\\033]0;a title without an end of line\\007'
cd "%s/$1" || exit
exec sh -c "${2#*&& }"
"""
_CLOSED = """#!/bin/sh
echo 'This account is currently not available.'
exit 1
"""


def put_ssh(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a script `ssh`."""
    (folder / "bin").mkdir()
    (folder / "bin" / "ssh").write_text(script)
    (folder / "bin" / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}:{os.environ['PATH']}")


@pytest.fixture
def two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """Directories under one name on two hosts: the command's, and the other's; both with the same run.yaml."""
    put_ssh(tmp_path, _SSH % tmp_path, monkeypatch)
    for name in (*LAUNCHER_VARIABLES, "SSH_CONNECTION", "PDSH_SSH_ARGS_APPEND", "GLOO_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    here, there = tmp_path / FIRST, tmp_path / SECOND
    for folder in (here, there):
        folder.mkdir()
        (folder / "run.yaml").write_text("seed: 1\n")
    (here / "hosts").write_text(f"{FIRST} slots=1\n{SECOND} slots=1\n")
    monkeypatch.chdir(here)
    return here, there


@pytest.mark.parametrize("words", [["--hostfile", "hosts"], ["--hostf", "hosts"], ["--hostfile=hosts"]])
def test_files_that_only_the_command_reads_or_rank_0_writes_may_be_on_one_host_alone(two, words):
    (two[0] / "left.jsonl").write_text("{}\n")
    (two[0] / "curves.png").write_text("")
    checked = before_start("hosts", ["run.yaml", *words, "--out", "left.jsonl", "--plot", "curves.png"])
    assert (checked.findings, checked.address) == ([], "127.0.0.1") and checked.port


@pytest.mark.parametrize("words", [["run.yaml", "--hostfile", "hosts"], ["--hostfile", "hosts", "--", "run.yaml"]])
def test_a_file_that_ranks_read_must_be_on_every_host_alike(two, words):
    (two[1] / "run.yaml").write_text("seed: 2\n")
    with pytest.raises(InputError, match=f"^hosts: {SECOND}: has another run.yaml than {FIRST}: copy it there$"):
        before_start("hosts", words)
    (two[1] / "run.yaml").unlink()
    with pytest.raises(InputError, match=f"^hosts: {SECOND}: has no run.yaml, or may not read it$"):
        before_start("hosts", words)


def test_a_host_that_only_says_why_it_lets_nobody_in_is_named_with_that(two, monkeypatch):
    (two[0].parent / "bin" / "ssh").write_text(_CLOSED)
    with pytest.raises(InputError) as refused:
        before_start("hosts", [])
    why = "cannot be used over ssh: This account is currently not available."
    assert str(refused.value).startswith(f"hosts: {FIRST}: {why} (and 1 more")


def test_an_agent_answers_what_it_cannot_do_and_goes_on():
    agent = Agent(FIRST, {}, by_ssh=False)
    try:
        with pytest.raises(Silent, match=r"^has no address by which other hosts could reach it$"):
            agent.ask("listen", address=None)
        with pytest.raises(Silent, match=r"^TypeError: "):
            agent.ask("clock", of="another version")
        with pytest.raises(Silent, match=r"^KeyError: 'weather'$"):
            agent.ask("weather")
        assert agent.ask("clock") > 0
    finally:
        agent.end()
