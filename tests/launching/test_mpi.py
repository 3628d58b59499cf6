"""Ranks that mpirun started know their numbers, and several of them do not take themselves for one each."""

from __future__ import annotations

import os

import pytest

from recyclable.errors import InputError
from recyclable.launching.mpi import describe_rank

OPEN_MPI = {
    **{"OMPI_COMM_WORLD_RANK": "5", "OMPI_COMM_WORLD_SIZE": "8"},
    **{"OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "4"},
}
HYDRA = {"PMI_RANK": "5", "PMI_SIZE": "8", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "4"}
WANTED = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_SIZE": "4", "MASTER_ADDR": "node-1"}


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    for name in (*OPEN_MPI, *HYDRA, *WANTED, "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("told", [OPEN_MPI, HYDRA], ids=["Open MPI", "Hydra"])
def test_the_launchers_numbers_are_taken_over(monkeypatch, told):
    for name, value in {**told, "MASTER_ADDR": "node-1"}.items():
        monkeypatch.setenv(name, value)
    describe_rank()
    assert {name: os.environ.get(name) for name in WANTED} == WANTED and "MASTER_PORT" in os.environ


def test_several_without_a_place_to_meet_are_refused_and_a_process_alone_is_left_alone(monkeypatch):
    before = dict(os.environ)
    describe_rank()
    assert dict(os.environ) == before
    for name, value in OPEN_MPI.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match="MASTER_ADDR: is not set"):
        describe_rank()


def test_what_deepspeed_has_said_holds(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "3")
    describe_rank()
    assert os.environ["RANK"] == "0"
