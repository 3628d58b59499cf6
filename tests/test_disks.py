"""Hosts are told apart by what they are and not by name alone; one rank writes for each disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import pytest

from recyclable import disks, distributed
from recyclable.errors import InputError


class Told:
    """Ranks of which each says what a list has for it."""

    said: ClassVar[list[object]] = []

    def gather(self, value: object) -> list[object]:
        return self.said.pop(0)


@pytest.fixture
def ranks(monkeypatch):
    """What ranks say, in turn."""
    monkeypatch.setattr(distributed, "Ranks", Told)
    monkeypatch.setattr(Told, "said", [])
    return Told.said


def test_hosts_of_one_name_are_told_apart(ranks):
    ranks.append([("node", "1"), ("node", "1"), ("node", "2"), ("other", "2")])
    assert disks.hosts() == ["node", "node", "node (2)", "other"]


def test_a_process_alone_keeps_its_caches_itself_and_leaves_no_mark(tmp_path):
    assert (disks.hosts()[0] != "", disks.keeper(tmp_path)) == (True, 0)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def asked_of(monkeypatch, tmp_path: Path, ranks) -> Callable[..., int]:
    """What `keeper` says on one rank, of whose like others say where they are, which path they have, what they see."""

    def keeper(own: int, hosts: str, paths: str, seen: str) -> int:
        monkeypatch.setattr(distributed, "rank", lambda: own)
        monkeypatch.setattr(distributed, "barrier", lambda: None)
        monkeypatch.setattr(distributed, "is_main", lambda: own == 0)
        ranks.extend([[(host, host) for host in hosts], [*paths], [each == "y" for each in seen]])
        return disks.keeper(tmp_path)

    return keeper


@pytest.mark.parametrize(("own", "shared", "keeper"), [(2, False, 2), (3, False, 2), (1, False, 0), (3, True, 0)])
def test_rank_0_writes_for_all_who_share_its_disk_else_the_first_of_a_host(
    asked_of: Callable[..., int], own: int, shared: bool, keeper: int
):
    assert asked_of(own, "aabb", "pppp", "yyyy" if shared else "yynn") == keeper


@pytest.mark.parametrize(("own", "keeper"), [(0, 0), (1, 1), (2, 1), (3, 3)])
def test_ranks_of_one_host_whose_paths_differ_write_for_themselves(asked_of: Callable[..., int], own: int, keeper: int):
    assert asked_of(own, "aaaa", "pqqr", "ynnn") == keeper


def test_paths_that_are_one_directory_have_one_writer(asked_of: Callable[..., int]):
    assert asked_of(1, "aa", "pq", "yy") == 0


def test_content_that_differs_on_one_rank_is_named_with_its_host(ranks):
    ranks += [[{"task": "d1", "base": "b"}, {"task": "d2", "base": "b"}], [("a", "1"), ("b", "2")]]
    with pytest.raises(InputError, match=r"^task: is not the same on b as on a: expected the same content$"):
        disks.require_alike({"task": "d1", "base": "b"})
    ranks += [[{"task": "d1"}] * 2]
    disks.require_alike({"task": "d1"})
