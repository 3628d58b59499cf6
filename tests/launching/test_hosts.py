"""Two and three hosts, each with a network, processes and a disk of its own: looked at before a run, then trained on.

Nothing is faked but Slurm's srun and scontrol: ssh, pdsh and mpirun go from host to host as anywhere.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import closing
from pathlib import Path

import faults_hosts
import pytest
import torch
from host_worlds import Cluster, ended
from network_hosts import missing
from processes import ROOT, SUPPORT
from safetensors.torch import load_file

from recyclable import distributed
from recyclable.config.run_file import read_run_file
from recyclable.machine import load_ds_config
from recyclable.recipes.pretrain import pretrain
from recyclable.recipes.pretrain_settings import read_pretrain_settings
from recyclable.weights.lineage import read_lineage

pytestmark = pytest.mark.skipif(
    bool(missing()) and not os.environ.get("CI"), reason=f"hosts on one machine need {', '.join(missing())}"
)
LAUNCH = (
    "import sys; from recyclable.launching.supervisor import launch; "
    "sys.exit(launch(sys.argv[1], sys.argv[4:], hostfile=sys.argv[2], launcher=sys.argv[3]))"
)
ODD = "two  words \"quoted\" 'so' $HOME `date` \\n %h %n %% ; | & é"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    assert not missing(), "hosts on one machine need these"
    cluster = Cluster(tmp_path_factory.mktemp("hosts"), 3)
    yield cluster
    cluster.close()


def refused(cluster: Cluster, *arguments: str | Path, **environment: str) -> str:
    """The one line of a run that ends with 2 before any rank is started."""
    status, out, err = ended(cluster.start(*arguments, **environment))
    lines = err.splitlines()
    assert (status, out, len(lines)) == (2, "", 1), (out, err)
    return lines[0].removeprefix("recyclable: error: ")


def test_a_host_that_is_not_reached_is_named_before_anything_starts(cluster):
    hostfile = cluster.folder / "with-a-stranger"
    hostfile.write_text("host-1 slots=1\nhost-9 slots=1\n")
    line = refused(cluster, "pretrain", cluster.run_file("stranger"), "--hostfile", hostfile)
    assert line.startswith(f"{hostfile}: host-9: cannot be used over ssh: ")
    assert "host-9" in line.partition("over ssh: ")[2] and not (cluster.folder / "stranger").exists()


def test_a_host_with_another_version_is_named(cluster):
    installed = cluster.hosts[1].own / "site" / "peft-0.1.dist-info"
    installed.mkdir(parents=True)
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: peft\nVersion: 0.1\n")
    path = f"{cluster.disk / 'site'}:{ROOT}"
    line = refused(
        cluster, "pretrain", cluster.run_file("version"), "--hostfile", cluster.switch.hostfile(), PYTHONPATH=path
    )
    assert "host-2: has peft 0.1, host-1 has " in line and line.endswith(": expected the same")


def test_a_host_with_another_run_config_is_named_and_one_without(cluster):
    config = cluster.run_file("config", folder=cluster.hosts[0].own)
    own = cluster.disk / config.name
    hosts = cluster.switch.hostfile(hosts=cluster.hosts[:2])
    assert f"host-2: has no {own}" in refused(cluster, "pretrain", own, "--hostfile", hosts)
    (cluster.hosts[1].own / config.name).write_text(config.read_text() + "\n")
    assert f"host-2: has another {own} than host-1: copy it there" in refused(
        cluster, "pretrain", own, "--hostfile", hosts
    )


def test_a_way_between_two_hosts_that_the_command_never_takes_is_tried(cluster):
    cluster.hosts[1].run(["ip", "route", "add", "blackhole", cluster.hosts[2].address])
    line = refused(cluster, "pretrain", cluster.run_file("way"), "--hostfile", cluster.switch.hostfile())
    cluster.hosts[1].run(["ip", "route", "del", "blackhole", cluster.hosts[2].address])
    # each of the two is out of the other's reach: packets of answers have no way back
    assert "host-2: host-3 cannot reach it at 10.77.0.2" in line and "1 more" in line


def test_the_doctor_measures_between_hosts_and_finds_the_one_whose_corpus_differs(cluster):
    with (cluster.hosts[2].own / "corpus" / "train.txt").open("a") as corpus:
        corpus.write("w1 w2\n")
    config, hosts = cluster.run_file("doctor"), cluster.switch.hostfile()
    status, out, err = ended(cluster.start("doctor", config, "--hostfile", hosts, "--json"))
    lines = out.splitlines()
    found = json.loads(lines[-1])
    assert [line.partition(":")[0] for line in lines[:3]] == ["host-1", "host-2", "host-3"]
    assert [(one["right"], one["mb_per_s"] > 0, one["backend"]) for one in found["trial"].values()] == [
        (True, True, "gloo")
    ] * 3
    problem = "corpus.train: train.txt on host-3 is not the same as on host-1: copy it there"
    assert [finding["text"] for finding in found["findings"] if finding["grave"]] == [problem]
    assert (status, err.splitlines()) == (2, [f"recyclable: error: run: {problem}"])
    assert not (cluster.folder / "doctor").exists()


@pytest.mark.parametrize("launcher", ["pdsh", "openmpi"])
def test_ranks_on_all_hosts_get_arguments_and_variables_as_they_are(cluster, launcher):
    (cluster.folder / ".deepspeed_env").write_text("# of the user\n\nOF_THE_FILE=a b\nTORCH_ODD_TOO=over the other\n")
    odd = {"TORCH_ODD": ODD, "TORCH_ODD_TOO": "x", "HF_TOKEN": "secret", "OTHER": "stays"}
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    hosts = cluster.switch.hostfile(hosts=cluster.hosts[:2])
    command = [sys.executable, "-c", LAUNCH, str(SUPPORT / "host_ranks.py"), str(hosts), launcher, ODD, "--flag=1%h"]
    variables = {**odd, **root, "OMP_NUM_THREADS": "1"}
    status, out, err = ended(cluster.hosts[0].start(command, cluster.folder, variables))
    assert status == 0, err
    told = sorted((json.loads(line[line.index("{") :]) for line in out.splitlines()), key=lambda one: one["rank"])
    names = {"TORCH_ODD": ODD, "OF_THE_FILE": "a b", "TORCH_ODD_TOO": "over the other", "HF_TOKEN": None, "OTHER": None}
    assert [one["host"] for one in told] == ["host-1", "host-2"]
    for one in told:
        assert (one["sum"], one["arguments"], one["interface"]) == (3, [ODD, "--flag=1%h"], "eth0")
    other = {name: told[1]["variables"].get(name) for name in names}
    assert other == names


def test_hosts_without_a_shared_disk_train_what_one_process_trains_and_each_caches_once(cluster):
    config = cluster.run_file("trained")
    hosts = cluster.switch.hostfile(hosts=cluster.hosts[:2])
    status, out, err = ended(cluster.start("pretrain", config, "--hostfile", hosts))
    assert status == 0, err
    assert "are compared by their content" in out
    for host in cluster.hosts[:2]:
        assert len(list((host.own / "cache" / "recyclable_packed").iterdir())) == 1
    made = cluster.folder / "made"
    told = [f"{key}={made / key}" for key in ("base", "corpus")]
    content = read_run_file(config, [*told, f"out={cluster.folder / 'alone'}"])
    with distributed.joined():
        pretrain(read_pretrain_settings(content, config), load_ds_config(ROOT / "ds_configs" / "cpu.json"))
    outs = [cluster.folder / name for name in ("trained", "alone")]
    losses = [read_lineage(out)["heldout"]["after"]["loss"] for out in outs]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    ours, alone = (load_file(out / "model.safetensors") for out in outs)
    assert ours.keys() == alone.keys()
    for name, tensor in ours.items():
        if not name.endswith("key.bias"):  # changes no output: its gradient is rounding alone, which Adam enlarges
            torch.testing.assert_close(tensor, alone[name], atol=2e-5, rtol=0)


@pytest.fixture(scope="module")
def slurm(cluster) -> Path:
    """A directory as users of the template have it; srun and scontrol are stand-ins, which go to the nodes over ssh."""
    folder = cluster.folder / "slurm"
    programs = folder / ".venv" / "bin"
    programs.mkdir(parents=True)
    (folder / "launch").symlink_to(ROOT / "launch")
    commands = {
        "srun": f"{sys.executable} {SUPPORT / 'slurm_run.py'}",
        "scontrol": f"{sys.executable} {SUPPORT / 'slurm_control.py'}",
        "deepspeed": f"{sys.executable} -m deepspeed.launcher.runner --log_level critical",
    }
    for name, command in commands.items():
        (programs / name).write_text(f'#!/bin/sh\nexec {command} "$@"\n')
        (programs / name).chmod(0o755)
    (programs / "activate").write_text(f"PATH={programs}:$PATH\n")
    return folder


def slurm_job(cluster: Cluster, folder: Path, template: str, changes: dict[str, str]) -> tuple[int, str, str]:
    """What became of a job of two nodes made of a template by changing some lines of it."""
    lines = (ROOT / "launch" / template).read_text().splitlines()
    for name, value in changes.items():
        assert sum(line.startswith(f"{name}=") for line in lines) == 1
        lines = [f"{name}={value}" if line.startswith(f"{name}=") else line for line in lines]
    (folder / "job.sbatch").write_text("\n".join(lines) + "\n")
    environment = {
        **{"SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "host-1,host-2", "SLURM_GPUS_ON_NODE": "1"},
        **{"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "HF_DATASETS_CACHE": str(cluster.disk / "cache")},
    }
    return ended(cluster.hosts[0].start(["bash", "job.sbatch"], folder, environment))


def test_the_slurm_template_starts_a_launcher_on_every_node(cluster, slurm):
    config = cluster.run_file("by-slurm", "tune")
    changes = {"VERB": "tune", "RUN": str(config), "DS_CONFIG": str(ROOT / "ds_configs" / "cpu.json")}
    status, out, err = slurm_job(cluster, slurm, "slurm.sbatch", changes)
    assert status == 0, f"{out}\n{err}"
    assert "tune: done" in out and (cluster.folder / "by-slurm" / "manifest.json").is_file()
    assert list(slurm.glob("hostfile.*")) == [] and not (slurm / "requeued").exists()


def test_a_slurm_job_that_stopped_after_a_checkpoint_is_queued_again_and_no_other(cluster, slurm):
    (slurm / "own").mkdir()
    for status in (75, 1):
        (slurm / "own" / "rank.py").write_text(f"import sys; sys.exit({status})\n")
        script = slurm / "launch"
        script.unlink()
        script.symlink_to(slurm / "own")
        assert slurm_job(cluster, slurm, "slurm.sbatch", {"VERB": "rank"})[0] == status
        assert (slurm / "requeued").exists() == (status == 75)
        (slurm / "requeued").unlink(missing_ok=True)


@pytest.fixture
def two_hosts(tmp_path):
    """Of which one is not to outlive its test."""
    with closing(Cluster(tmp_path / "two", 2)) as cluster:
        yield cluster


def test_a_host_that_is_killed_is_named_and_the_other_finishes_as_if_nothing_had_been(two_hosts, tmp_path):
    assert faults_hosts.killed(two_hosts, faults_hosts.trained_alone(tmp_path / "alone")) == ""


def test_hosts_that_are_cut_off_from_each_other_both_say_so_and_end(two_hosts, tmp_path):
    assert faults_hosts.cut_without_ssh(two_hosts, tmp_path) == ""
