"""What the planner says of the shipped ds_configs for the models that their README names; run, it writes it there,
and the micro-batches into the files."""

from __future__ import annotations

import re
import sys
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

from shapes import write_shape  # noqa: E402

from recyclable import machine  # noqa: E402
from recyclable.planning.devices import by_name  # noqa: E402
from recyclable.planning.fitting import MARGIN, Fit, Fitter  # noqa: E402
from recyclable.planning.states import Sizes, Zero, steady  # noqa: E402
from recyclable.planning.time import Fleet  # noqa: E402
from recyclable.recipes.plan import fitter  # noqa: E402
from recyclable.recipes.planned import planned  # noqa: E402
from recyclable.recipes.pretrain_settings import read_pretrain_settings  # noqa: E402

README = ROOT / "ds_configs" / "README.md"
CARDS = (16, 24, 40, 80)
"""GB of GPUs that there are."""
RANKS = {
    "125m_zero1": 8,
    "350m_zero1": 8,
    "350m_zero1_checkpointing": 8,
    "1b_zero2": 8,
    "1b_zero2_checkpointing": 8,
    "3b_zero2": 8,
    "3b_zero3": 8,
    "3b_zero3_checkpointing": 8,
    "3b_zero3_offload_checkpointing": 2,
    "7b_zero3": 8,
    "7b_zero3_checkpointing": 8,
    "7b_zero3_offload": 8,
    "7b_zero3_offload_checkpointing": 2,
    "7b_zero3_nvme_checkpointing": 2,
    "13b_zero3_checkpointing": 8,
    "13b_zero3_offload_checkpointing": 8,
    "13b_zero3_nvme_checkpointing": 8,
    "34b_zero3_checkpointing": 16,
    "34b_zero3_offload_checkpointing": 8,
    "34b_zero3_nvme_checkpointing": 8,
    "70b_zero3_checkpointing": 32,
    "70b_zero3_offload_checkpointing": 8,
    "70b_zero3_nvme_checkpointing": 8,
}
"""Of the runs that the README speaks of; hosts have 8 at most."""


def figures(name: str) -> list[str]:
    """The README's cells: GPUs from, micro-batch, ranks; GB of a device at its peak and between steps, host, NVMe."""
    size, ranks = name.partition("_")[0], RANKS[name]
    ds_config, local = machine.load_ds_config(name), min(8, ranks)
    fit = tried(name, ds_config["train_micro_batch_size_per_gpu"])
    zero = Zero.of(ds_config, ranks, on_cpu=False, accumulating=True)
    stays = steady(Sizes.of(_fitter(size, tokens(name)).objective), zero).device.total()
    card = next((card for card in CARDS if fit.memory.device <= (1 - MARGIN) * card * 1e9), None)
    elsewhere = (f"{local * of / 1e9:,.0f}" if of else "" for of in (fit.memory.host, fit.memory.nvme))
    texts = f"{fit.rows} x {tokens(name)}"
    return [f"{card} GB", texts, str(ranks), f"{fit.memory.device / 1e9:.1f}", f"{stays / 1e9:.1f}", *elsewhere]


def tried(name: str, rows: int) -> Fit:
    """A file with a micro-batch of so many rows, two of which make up a step."""
    fleet = Fleet(by_name("a100-80gb"), RANKS[name], -(-RANKS[name] // 8), 1e15)
    one = replace(_fitter(name.partition("_")[0], tokens(name)), share=2 * rows, fleet=fleet)
    return one.tried(machine.load_ds_config(name), rows)


def tokens(name: str) -> int:
    """Of a text: with checkpointing decoders have long ones."""
    return 2048 if "checkpointing" in name and not name.startswith("350m") else 512


@cache
def _fitter(size: str, length: int) -> Fitter:
    """Of a model trained whole on text; what it traces it keeps, for all files of that size."""
    folder = Path(tempfile.mkdtemp()) / size
    keys = {"base": str(write_shape(size, folder)), "lm": "masked" if size in ("125m", "350m") else "causal"}
    keys |= {"attention": "full", "max_length": length, "corpus": "none", "out": "none"}
    run = read_pretrain_settings({**keys, "max_steps": 1, "learning_rate": 1e-4}, size)
    return fitter(run, planned(run), Fleet(by_name("a100-80gb"), 1))


def cells(name: str) -> list[str]:
    """A file's line in the README."""
    (found,) = re.findall(rf"^\| `{name}\.json` \|(.*)\|$", README.read_text(), re.MULTILINE)
    return [cell.strip() for cell in found.split("|")]


def largest(name: str, card: int) -> int:
    """The largest micro-batch, a power of two, that fits on a GPU of so many GB; 1 where none does."""
    rows = 16 if tokens(name) == 512 else 8
    while rows > 1 and tried(name, rows).memory.device > (1 - MARGIN) * card * 1e9:
        rows //= 2
    return rows


def main() -> None:
    """Set the largest micro-batches that fit on the GPUs that the README names, and bring its figures up to date."""
    for name in RANKS:
        file = README.parent / f"{name}.json"
        rows = largest(name, int(cells(name)[0].split()[0]))
        file.write_text(re.sub(r'(?<="train_micro_batch_size_per_gpu": )\d+', str(rows), file.read_text()))
        card, *rest = figures(name)
        said = re.sub(r"^\d+ GB", card, cells(name)[0])
        line = f"| `{name}.json` | {' | '.join([said, *rest])} |"
        print(line, flush=True)
        README.write_text(re.sub(rf"^\| `{name}\.json` \|.*$", line, README.read_text(), flags=re.MULTILINE))


if __name__ == "__main__":
    main()
