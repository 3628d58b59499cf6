"""The reports of several hosts beside each other: the one that is wrong is named, and nothing is where none is."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from recyclable.launching.comparing import compare, odd_ones
from recyclable.launching.host_report import report

GPUS = ["NVIDIA H100 80GB HBM3, 81559 MiB"] * 8
SOUND: dict[str, Any] = {
    **{"hostname": "x", "versions": {"python": "3.11.7", "torch": "2.13.0"}, "code": "c0de", "cpus": 64, "threads": 8},
    **{"devices": GPUS, "shared_memory": 64 << 30, "open_files": 1 << 20, "chosen_interfaces": {}},
    **{"interfaces": {"lo": ["127.0.0.1"], "eth0": ["10.0.0.1"]}, "files": {"run.yaml": "d1"}},
    **{"folders": {"/out": {"free": 1 << 40, "writable": True}}},
}
SLOTS = {"a": 8, "b": 8, "c": 8}
NO_SKEW = dict.fromkeys(SLOTS, 0.01)


def found(changes: dict[str, dict[str, Any]], skews: dict[str, float] = NO_SKEW) -> list[tuple[str, bool, str]]:
    """(host, whether it is grave, text) where hosts differ from a sound one."""
    reports = {host: {**copy.deepcopy(SOUND), **changes.get(host, {})} for host in SLOTS}
    return [(each.host, each.grave, each.text) for each in compare(reports, skews, SLOTS)]


def test_nothing_is_wrong_with_hosts_that_are_alike_and_sound():
    assert found({}) == []


@pytest.mark.parametrize(
    ("change", "grave", "words"),
    [
        ({"versions": {"python": "3.11.7", "torch": "2.12.0"}}, True, "has torch 2.12.0, a has 2.13.0"),
        ({"versions": {"python": "3.11.7", "torch": None}}, True, "has no torch, a has 2.13.0"),
        ({"code": "0ther"}, True, "another state of recyclable's code than a"),
        ({"files": {"run.yaml": "d2"}}, True, "has another run.yaml than a: copy it there"),
        ({"files": {"run.yaml": None}}, True, "has no run.yaml"),
        ({"devices": GPUS[:7]}, True, "has 7 GPUs for 8 ranks"),
        ({"devices": GPUS[:7]}, False, "has 7 x NVIDIA H100"),
        ({"devices": None, "cpus": 4}, False, "has 4 cores for 8 ranks of 8 threads"),
        ({"chosen_interfaces": {"GLOO_SOCKET_IFNAME": "ib0"}}, True, "has no interface ib0 (GLOO_SOCKET_IFNAME)"),
        ({"folders": {"/out": {"free": 1 << 40, "writable": False}}}, True, "/out cannot be written to"),
        ({"folders": {"/out": {"free": 5 << 10, "writable": True}}}, True, "/out has 0.00 GiB of room left"),
        ({"folders": {"/out": {"free": 1 << 29, "writable": True}}}, False, "/out has 0.50 GiB of room left"),
        ({"shared_memory": 64 << 20}, False, "/dev/shm has 64 MiB"),
        ({"open_files": 256}, False, "a process may open 256 files"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_the_host_that_is_wrong_is_named_wherever_it_stands(change, grave, words):
    for host in ("b", "c"):
        assert [each[:2] for each in found({host: change}) if words in each[2]] == [(host, grave)]
    assert [
        each[0]
        for each in found({"a": change})
        if words.replace("a has", "b has").replace("than a", "than b") in each[2]
    ] == ["a"]


@pytest.mark.parametrize("name", ["eth", "=eth0", "^docker", "eth0,eth1"])
def test_interfaces_are_named_to_nccl_as_it_reads_them(name):
    assert found({"b": {"chosen_interfaces": {"NCCL_SOCKET_IFNAME": name}}}) == []


def test_the_clock_is_the_one_that_differs_from_the_others_not_from_the_command():
    assert found({}, {"a": 90.0, "b": 89.0, "c": 91.0}) == []
    assert found({}, {"a": 0.0, "b": 0.1, "c": -70.0}) == [
        ("c", True, "its clock is 70 s behind the others': set it, by NTP for example")
    ]
    assert found({}, {"a": 60.0, "b": 0.1, "c": 0.0})[0][::2] == (
        "a",
        "its clock is 60 s ahead of the others': set it, by NTP for example",
    )


def test_the_odd_one_is_the_one_in_the_minority_and_of_two_the_second():
    assert odd_ones({"a": 1, "b": 2, "c": 2}) == (["a"], "b")
    assert odd_ones({"a": 1, "b": 2}) == (["b"], "a")
    assert odd_ones({"a": None, "b": None}) == ([], "a")
    assert odd_ones({}) == ([], None)


def test_a_host_says_of_itself_what_is_compared(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (tmp_path / "run.yaml").write_text("x")
    told = report([str(tmp_path / "run.yaml"), str(tmp_path / "none")], [str(tmp_path / "not" / "yet")])
    assert SOUND.keys() <= told.keys()
    assert [digest is None for digest in told["files"].values()] == [False, True]
    assert told["folders"][str(tmp_path / "not" / "yet")]["writable"]
    assert [each.text for each in compare({"a": told}, {"a": 0.0}, {"a": 1})] == [
        f"has no {tmp_path / 'none'}, or may not read it"
    ]
