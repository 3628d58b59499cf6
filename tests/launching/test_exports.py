"""What goes along to other hosts: variables by name, a user's file over them, and no secrets; quoted for two shells."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import pytest

from recyclable.errors import InputError
from recyclable.launching.command import launcher_command, launcher_environment
from recyclable.launching.exports import exports, for_shells
from recyclable.launching.hostfile import read_hostfile, write_hostfile

ODD = ["plain", "two words", "\"quoted\" 'so'", "$HOME `date` \\ \\\\n", "100% %h %n", "; | & > < * ? ~ !", "é ü", ""]


@pytest.fixture(autouse=True)
def places(tmp_path, monkeypatch):
    """A home and a working directory without anybody's files."""
    for name in ("home", "work"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.delenv("DS_ENV_FILE", raising=False)


def test_libraries_variables_go_along_and_neither_others_nor_secrets():
    environment = {"HF_HOME": "/hf", "NCCL_DEBUG": "INFO", "HF_TOKEN": "s", "TORCH_API_KEY": "s", "EDITOR": "vi"}
    assert exports(environment) == {"HF_HOME": "/hf", "NCCL_DEBUG": "INFO"}


def test_the_users_file_goes_over_the_environment_and_the_working_directory_over_the_home():
    Path.home().joinpath(".deepspeed_env").write_text("# mine\n\nA=home\nB = b c \nHF_HOME=/other\nHF_TOKEN=meant\n")
    Path(".deepspeed_env").write_text("A=here=there\n")
    assert exports({"HF_HOME": "/hf"}) == {"A": "here=there", "B": "b c", "HF_HOME": "/other", "HF_TOKEN": "meant"}
    Path("named").write_text("C=1\n")
    assert exports({"DS_ENV_FILE": "named"}) == {"C": "1"}


@pytest.mark.parametrize("line", ["NAME", "=x", "two words=x", "export A=1"])
def test_a_line_that_sets_nothing_is_refused_by_its_number(line):
    Path(".deepspeed_env").write_text(f"A=1\n{line}\n")
    with pytest.raises(InputError, match=r"\.deepspeed_env, line 2: found .*, expected NAME=value"):
        exports({})


@pytest.mark.parametrize("value", ODD)
def test_values_come_out_of_deepspeed_pdsh_and_a_shell_as_they_went_in(value):
    from deepspeed.launcher.multinode_runner import PDSHRunner

    runner = PDSHRunner.__new__(PDSHRunner)
    runner.exports = {}
    for line in for_shells({"ODD": value}).splitlines():
        runner.add_export(*line.split("=", maxsplit=1))
    line = f"export ODD={runner.exports['ODD']}; printenv ODD".replace("%%", "%")  # as pdsh does
    assert subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True).stdout == value + "\n"


@pytest.mark.parametrize("value", ODD)
def test_arguments_come_out_of_deepspeed_pdsh_and_a_shell_as_they_went_in(value, monkeypatch):
    Path("hosts").write_text("192.0.2.7 slots=1\n192.0.2.8 slots=1\n")
    last = launcher_command("script.py", [value], None, "hosts", None)[-1]
    if " " in last:
        last = '"{}"'.format(last.replace('"', '\\"'))  # deepspeed's own
    line = f"printf '%s\\n' {last}".replace("%%", "%") if "%%" in last else f"printf '%s\\n' {last}"
    assert subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True).stdout == value + "\n"


def test_the_launcher_is_given_a_file_that_only_its_owner_reads_and_open_mpi_names():
    (environment := launcher_environment(1, local=False, extra={"SECRET_PLACE": "port,token"}))
    file = Path(environment["DS_ENV_FILE"])
    assert "SECRET_PLACE=port,token\n" in file.read_text() and file.stat().st_mode & 0o077 == 0
    assert launcher_environment(1, False, {"X": "a b"}, "openmpi")["X"] == "a b"
    Path("hosts").write_text("192.0.2.7 slots=1\n")
    command = launcher_command("script.py", [], 3, "hosts", 1234, launcher="openmpi", address="192.0.2.7", extra=["X"])
    assert "-x X" in command[command.index("--launcher_args") + 1]
    assert "--num_gpus" not in command  # which deepspeed refuses there: slots say it
    assert read_hostfile(command[command.index("--hostfile") + 1]) == {"192.0.2.7": 3}
    assert os.environ.get("X") is None and shlex.join(command)


def test_a_hostfile_is_read_as_deepspeed_reads_it_and_written_again():
    Path("hosts").write_text("# ours\n\nnode-1 slots=8\n  node-2\tslots=4 # fewer\n")
    assert read_hostfile("hosts") == {"node-1": 8, "node-2": 4}
    assert read_hostfile(write_hostfile(Path("again"), {"node-2": 1})) == {"node-2": 1}


@pytest.mark.parametrize("text", ["node-1 slots=0\n", "-oProxyCommand=x slots=1\n", "a slots=1\na slots=2\n"])
def test_hosts_without_ranks_options_for_ssh_and_hosts_named_twice_are_refused(text):
    Path("hosts").write_text(text)
    with pytest.raises(InputError, match=r"hosts: (holds|names)"):
        read_hostfile("hosts")
