"""Names and interfaces of this host, as ranks find each other by them."""

from __future__ import annotations

import socket

import pytest

from recyclable import host


def test_this_host_is_known_by_its_names_and_addresses_and_no_other_is():
    assert all(map(host.is_here, ("localhost", "127.0.0.1", socket.gethostname())))
    assert all(host.is_here(address) for found in host.addresses().values() for address in found if ":" not in address)
    assert not any(map(host.is_here, ("192.0.2.77", "no-such-host.invalid")))


@pytest.mark.parametrize("name", ["127.0.0.1", "localhost", "::1"])
def test_ranks_of_one_host_need_no_interface(name):
    assert host.interface_towards(name) is None


def test_a_name_that_stands_for_the_loopback_address_means_the_interface_that_leads_anywhere(monkeypatch):
    ways = {"node-1": "127.0.1.1", host._ANYWHERE: "10.0.0.5", "node-2": "10.1.0.5"}
    monkeypatch.setattr(host, "address_towards", ways.get)
    own = {"lo": ["127.0.0.1"], "eth0": ["10.0.0.5"], "ib0": ["10.1.0.5"]}
    monkeypatch.setattr(host, "addresses", lambda: own)
    assert [host.interface_towards(name) for name in ("node-1", "node-2", "node-3")] == ["eth0", "ib0", None]
