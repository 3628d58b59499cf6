"""Ranks that mpirun or srun started by themselves: their numbers in the variables by which torch knows them."""

from __future__ import annotations

import os

from recyclable.errors import InputError

_TOLD = (  # by whom: rank, number of ranks, number on this host, how many of them on this host
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
)
_WANTED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE")
_PORT = "29500"


def describe_rank() -> None:
    """Set RANK and its like where only an MPI launcher has told them; nothing where there is none.

    Without it each of its ranks would take itself for the only one. Raises InputError where several have no
    `MASTER_ADDR`, the first host's address, to meet at.
    """
    if "RANK" in os.environ:
        return
    for told in _TOLD:
        if all(name in os.environ for name in told[:3]):
            found = {new: os.environ[old] for new, old in zip(_WANTED, told, strict=True) if old in os.environ}
            if int(found["WORLD_SIZE"]) > 1 and "MASTER_ADDR" not in os.environ:
                problem = "is not set, expected the first host's address: `mpirun -x MASTER_ADDR=...`"
                raise InputError("MASTER_ADDR", problem)
            os.environ.update(found)
            os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
            os.environ.setdefault("MASTER_PORT", _PORT)
            return
