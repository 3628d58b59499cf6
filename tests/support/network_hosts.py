"""Hosts on one machine: each a network, process, mount and name space of its own with an sshd, all on one switch.

A host is its process 1: killing that kills all that runs there, at once. Needs root, iproute2, openssh-server,
pdsh and openmpi-bin; `.ci/run` installs them.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from processes import LAUNCHER_VARIABLES, ROOT

NEEDED = ("ip", "sshd", "ssh-keygen", "ssh", "pdsh", "mpirun", "unshare", "nsenter")
_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
_PATIENCE_S = 30
_UNSHARE = ["unshare", "--net", "--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child", "--mount-proc"]
# Process 1: a disk and names of its own, then sshd; it takes in orphans, as process 1 must, and ends with its input.
_BOOT = """
set -e
hostname {name}
mount --make-rprivate /
mount --bind {own} {disk}
mount --bind {files}/ssh_config /etc/ssh/ssh_config
mount --bind {files}/hosts /etc/hosts
mount -t tmpfs tmpfs /dev/shm
mkdir -p /run/sshd
ip link set lo up
read networked
{sshd} -D -f {files}/sshd_config -E {own}/sshd.log &
echo up
cat > /dev/null
"""
_SSHD = """
Port 22
HostKey {files}/key
AuthorizedKeysFile {files}/key.pub
StrictModes no
UsePAM no
PidFile none
PermitRootLogin yes
MaxStartups 100
"""
_SSH = """
Host *
  IdentityFile {files}/key
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  LogLevel ERROR
"""


def missing() -> list[str]:
    """What is not there that hosts need."""
    lacking = [name for name in NEEDED if shutil.which(name, path=_PATH) is None]
    return lacking + ([] if os.geteuid() == 0 else ["root"])


class Host:
    """One host; what it has at `disk` no other host sees."""

    def __init__(self, switch: Switch, number: int) -> None:
        self.name, self.address, self._switch = f"host-{number}", f"10.77.0.{number}", switch
        self.own = switch.folder / self.name
        self.own.mkdir()
        self._cable = f"{switch.tag}-{number}"
        script = _BOOT.format(
            name=self.name, own=self.own, disk=switch.disk, files=switch.files, sshd=shutil.which("sshd", path=_PATH)
        )
        self._process = subprocess.Popen(
            [*_UNSHARE, "sh", "-c", script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "PATH": _PATH},
        )
        self._pid = self._child()

    def _child(self) -> int:
        """Process 1 of the host, by its number here."""
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children")
        end = time.monotonic() + _PATIENCE_S
        while not (found := children.read_text().split()):
            assert self._process.poll() is None and time.monotonic() < end, f"{self.name} does not start"
            time.sleep(0.02)
        return int(found[0])

    def boot(self) -> None:
        """Plug the cable in, and start sshd."""
        inside, switch = self.command(["ip"]), self._switch
        switch.ip("link", "add", self._cable, "type", "veth", "peer", "name", f"{self._cable}p")
        switch.ip("link", "set", f"{self._cable}p", "netns", str(self._pid), "name", "eth0")
        switch.ip("link", "set", self._cable, "master", "bridge0", "up")
        subprocess.run([*inside, "addr", "add", f"{self.address}/24", "dev", "eth0"], check=True)
        subprocess.run([*inside, "link", "set", "eth0", "up"], check=True)
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write("networked\n")
        self._process.stdin.flush()
        assert self._process.stdout.readline() == "up\n"

    def command(self, command: list[str]) -> list[str]:
        """What runs a command on this host, when run here."""
        return ["nsenter", "--target", str(self._pid), "--all", f"--wd={os.getcwd()}", "--", *command]

    def start(self, command: list[str], cwd: Path, environment: dict[str, str] | None = None) -> subprocess.Popen[str]:
        """Start a command there; its output is piped, in text."""
        names = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
        names |= {"PYTHONPATH": str(ROOT), "PATH": _PATH, **(environment or {})}
        inside = ["nsenter", "--target", str(self._pid), "--all", f"--wd={cwd}", "--", *command]
        return subprocess.Popen(
            inside, env=names, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def run(self, command: list[str], timeout_s: float = 60) -> str:
        """Run a short command there; what it printed."""
        process = self.start(command, self._switch.folder)
        out, err = process.communicate(timeout=timeout_s)
        assert process.returncode == 0, err
        return out

    def processes(self, pattern: str) -> list[str]:
        """Command lines of all that runs there and matches, sshd and shells left out."""
        lines = self.run(["ps", "-eo", "args"]).splitlines()
        return [line for line in lines if re.search(pattern, line) and not line.startswith(("ps ", "sshd"))]

    def unplug(self) -> None:
        """Cut it off the network: packets are lost, nobody is told."""
        self._switch.ip("link", "set", self._cable, "down")

    def plug(self) -> None:
        """The network is back."""
        self._switch.ip("link", "set", self._cable, "up")

    def kill(self) -> None:
        """Pull the plug: off the network first, so that not even its connections say that they end."""
        if self._process.poll() is None:
            self.unplug()
            os.kill(self._pid, signal.SIGKILL)
            self._process.wait()


class Switch:
    """A network of hosts; `folder/disk` is each host's own, all else of the file system they share."""

    def __init__(self, folder: Path, hosts: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.disk, self.files = folder, folder / "disk", folder / "files"
        self.tag = f"rh{os.getpid() % 10000}{time.monotonic_ns() % 1000}"[:9]
        self.disk.mkdir()
        self.files.mkdir()
        self._process = subprocess.Popen(["unshare", "--net", "cat"], stdin=subprocess.PIPE)  # gone with this process
        self._name = str(self._process.pid)
        self.hosts: list[Host] = []
        try:
            self._write(hosts)
            self._wait_for_space()
            self.ip("link", "add", "bridge0", "type", "bridge")
            self.ip("link", "set", "bridge0", "up")
            self.hosts += [Host(self, number) for number in range(1, hosts + 1)]
            for host in self.hosts:
                host.boot()
        except BaseException:
            self.close()
            raise

    def _write(self, hosts: int) -> None:
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.files / "key")], check=True)
        (self.files / "sshd_config").write_text(_SSHD.format(files=self.files))
        (self.files / "ssh_config").write_text(_SSH.format(files=self.files))
        names = [f"10.77.0.{number} host-{number}" for number in range(1, hosts + 1)]
        (self.files / "hosts").write_text("\n".join(["127.0.0.1 localhost", *names, ""]))

    def _wait_for_space(self) -> None:
        own, end = Path("/proc/self/ns/net").readlink(), time.monotonic() + _PATIENCE_S
        while Path(f"/proc/{self._name}/ns/net").readlink() == own:
            assert time.monotonic() < end, "no network space"
            time.sleep(0.02)

    def ip(self, *arguments: str) -> None:
        """iproute2's `ip`, in the switch."""
        inside = ["nsenter", "--target", self._name, "--net", "--", "ip", *arguments]
        subprocess.run(inside, check=True, env={**os.environ, "PATH": _PATH})

    def hostfile(self, slots: int = 1, hosts: list[Host] | None = None) -> Path:
        """A hostfile of these hosts, or of all."""
        chosen = self.hosts if hosts is None else hosts
        path = self.folder / f"hostfile-{'-'.join(host.name for host in chosen)}-{slots}"
        path.write_text("".join(f"{host.name} slots={slots}\n" for host in chosen))
        return path

    def close(self) -> None:
        """All hosts end, and the network with them."""
        for host in self.hosts:
            host.kill()
        self._process.kill()
        self._process.wait()


def recyclable(*arguments: str) -> list[str]:
    """The command line of the verb, as users give it."""
    return [sys.executable, "-m", "recyclable.cli", *arguments]
