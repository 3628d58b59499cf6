"""Hosts that are lost or cut off while they train: whether the others say so, end in time, go on, and finish the same.

Two and three hosts on this machine, each with a network, processes and a disk of its own. Needs root, iproute2,
openssh-server and pdsh.

python benchmarks/faults_hosts.py [--quick] [--json]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from subprocess import Popen

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "support"))

from host_worlds import Cluster, ended  # noqa: E402
from network_hosts import Host  # noqa: E402

STEPS, SAVE_EVERY = 30, 3
LOSSES, WEIGHTS = 1e-5, 5e-5
"""What training on another number of ranks may change: sums in fp32 come in another order."""
END_S = 60
"""Within which everything has ended that is to end: half of it is the silence after which a host is given up."""
PORT = 29400
OURS = r"deepspeed|launch/pretrain|recyclable"


def main() -> None:
    """Try them, print a line each and one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one of each with two hosts")
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    arguments = parser.parse_args()
    found = hosts(arguments.quick)
    if arguments.json:
        print(json.dumps(found))


def hosts(quick: bool) -> dict[str, int]:
    """How many scenarios there are, and how many come out right."""
    scenarios: dict[str, tuple[int, Callable[[Cluster, Path], str]]] = {
        "two hosts train": (2, trained),
        "one of two is killed, the other finishes": (2, killed),
        "two are cut off from each other": (2, cut),
        "two are cut off from each other, each with a launcher of its own": (2, cut_without_ssh),
    }
    if not quick:
        scenarios |= {
            "three hosts train": (3, trained),
            "one of three is killed, two finish": (3, killed),
            "the first of three but the command's is killed, two finish": (3, partial(killed, which=1)),
            "one of three is cut off": (3, cut),
        }
    right = 0
    with tempfile.TemporaryDirectory() as scratch:
        alone = trained_alone(Path(scratch) / "alone")
        for number, (name, (count, scenario)) in enumerate(scenarios.items()):
            with closing(Cluster(Path(scratch) / str(number), count)) as cluster:
                problem = scenario(cluster, alone)
            right += not problem
            print(f"{name}: {problem or 'right'}", flush=True)
    return {"tried": len(scenarios), "right": right}


def trained_alone(folder: Path) -> Path:
    """The result of one process on one host, which all others are compared with."""
    with closing(Cluster(folder, 1)) as cluster:
        status, _, err = ended(cluster.start("pretrain", _config(cluster)))
    assert status == 0, err
    return folder / "run"


def trained(cluster: Cluster, alone: Path) -> str:
    """What is wrong with a run on all hosts, compared with one process's."""
    status, _, err = ended(cluster.start("pretrain", _config(cluster), "--hostfile", cluster.switch.hostfile()))
    return f"ended with {status}: {err}" if status else unlike(cluster.folder / "run", alone)


def killed(cluster: Cluster, alone: Path, which: int = -1) -> str:
    """What is wrong after a host was killed: the rest goes on from the last checkpoint, and finishes the same."""
    lost = cluster.hosts[which]
    again = ["--max-restarts", "1", "--elastic"]
    run = cluster.start("pretrain", _config(cluster), "--hostfile", cluster.switch.hostfile(), *again)
    _wait_for_checkpoint(cluster, run)
    lost.kill()
    status, _, err = ended(run)
    if status != 0:
        return f"ended with {status}: {err}"
    left = len(cluster.hosts) - 1
    if f"on {lost.name} is lost" not in err or f"restart 1 of 1: on {left} ranks" not in err:
        return f"did not say so: {err}"
    return unlike(cluster.folder / "run", alone)


def cut(cluster: Cluster, alone: Path) -> str:
    """What is wrong after the last host was cut off: the command says so and ends, and so do ranks on both sides."""
    lost = cluster.hosts[-1]
    run = cluster.start("pretrain", _config(cluster), "--hostfile", cluster.switch.hostfile())
    _wait_for_checkpoint(cluster, run)
    begin = time.monotonic()
    lost.unplug()
    status, _, err = ended(run)
    if status != 1 or f"on {lost.name} is lost" not in err or "go on with --resume" not in err:
        return f"ended with {status}: {err}"
    return _outlived(cluster.hosts, begin)


def cut_without_ssh(cluster: Cluster, alone: Path) -> str:
    """The same where a launcher was started on each host: both sides say so."""
    hostfile, config = cluster.switch.hostfile(), _config(cluster)
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--log_level", "critical", "--no_local_rank"]
    command += ["--no_ssh", "--hostfile", str(hostfile), "--master_addr", cluster.hosts[0].address]
    command += ["--master_port", str(PORT), "--node_rank"]
    script = [str(ROOT / "launch" / "pretrain.py"), str(config)]
    runs = [cluster.started([*command, str(number), *script], on=number) for number in range(len(cluster.hosts))]
    _wait_for_checkpoint(cluster, runs[0])
    begin = time.monotonic()
    cluster.hosts[-1].unplug()
    found = [ended(run) for run in runs]
    for status, _, err in found:
        if status == 0 or "recyclable: error: " not in err:
            return f"ended with {status}: {err}"
    return _outlived(cluster.hosts, begin)


def unlike(out: Path, alone: Path) -> str:
    """In what a run's result differs from another's, if in anything."""
    losses = [json.loads((run / "lineage.json").read_text())["heldout"]["after"]["loss"] for run in (out, alone)]
    if abs(losses[0] - losses[1]) > LOSSES:
        return f"held-out loss {losses[0]}, expected {losses[1]}"
    ours, theirs = (load_file(run / "model.safetensors") for run in (out, alone))
    for name, tensor in theirs.items():
        # a key's bias changes no output: its gradient is rounding alone, which Adam enlarges
        if not name.endswith("key.bias") and not torch.allclose(ours[name], tensor, atol=WEIGHTS, rtol=0):
            return f"{name} differs by {(ours[name] - tensor).abs().max():.2g}"
    return ""


def _config(cluster: Cluster) -> Path:
    steps = {"max_steps": STEPS, "eval_every": STEPS, "save_every": SAVE_EVERY, "adam_epsilon": 1e-6}
    return cluster.run_file("run", **steps, train_batch_size=12, learning_rate=1e-3)


def _wait_for_checkpoint(cluster: Cluster, run: Popen[str]) -> None:
    """Until one is whole: then training is on its way."""
    end = time.monotonic() + 600
    while not any((cluster.folder / "run" / "checkpoints").glob("step-*/complete.json")):
        assert run.poll() is None and time.monotonic() < end, "no checkpoint was written"
        time.sleep(0.02)


def _outlived(all_hosts: list[Host], begin: float) -> str:
    """Which processes of ours are still there when they should have ended long since."""
    while True:
        left = [f"{host.name}: {line}" for host in all_hosts for line in host.processes(OURS)]
        if not left:
            return ""
        if time.monotonic() > begin + END_S:
            return f"outlived it: {left}"
        time.sleep(0.5)


if __name__ == "__main__":
    main()
