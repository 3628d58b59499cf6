"""What runs survive: kills at random moments, deaths inside saves, other ranks and stages, damage, lost hosts.

    python benchmarks/faults.py [--quick] [--json] [--only PART ...] [--scratch DIR]

Parts: kills, file_operations, resizes, hosts, corrupted, save (benchmarks/faults_*.py say what each counts as right).
Each kill is told with its seed, which fixes what is killed and when in the run's course. Ranks are forked from a
process that has everything imported; a few kills are of a rank of the real command. `hosts` needs network namespaces
(root), and is null without. The last line with `--json`: {"kills": {"tried", "exact"}, "file_operations": {"tried",
"resumed"}, "resizes": {"tried", "equal", "max_loss_diff", "ids_wrong"}, "hosts": {"tried", "right"}, "corrupted":
{"tried", "wrongly_loaded"}, "save": {"blocked_share", "mb_per_s_ratio", "extra_memory_ratio"}}; parts that were not
asked for are null.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.update({"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"})
# As in a run that has to be measured: what is freed goes back to the system, else the peak is of what once was.
os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", "65536")
_TESTS = Path(__file__).resolve().parents[1] / "tests"
sys.path += [str(_TESTS / "support"), str(_TESTS)]  # worlds and ways to damage a checkpoint are the tests'

import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402


def main() -> None:
    """Run the parts, print a line for each and, last, one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the cases")
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    parser.add_argument("--only", nargs="*", choices=PARTS, default=list(PARTS), help="these parts alone")
    parser.add_argument("--scratch", type=Path, help="where runs are (default: the temporary directory)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tqdm.monitor_interval = 0  # no thread of its own: children are forked
    found: dict[str, Any] = dict.fromkeys(PARTS)
    for name in PARTS:
        if name in arguments.only:
            with tempfile.TemporaryDirectory(dir=arguments.scratch, prefix=f"{name}-") as folder:
                found[name] = PARTS[name](Path(folder), arguments.quick)
            print(f"{name:16} {json.dumps(found[name])}", flush=True)
    if arguments.json:
        print(json.dumps(found))


def _kills(folder: Path, quick: bool) -> dict[str, int]:
    from faults_kills import kills

    count, commands = (10, 1) if quick else (100, 4)
    with tqdm(total=count, desc="kills") as bar:

        def tell(kill: Any) -> None:
            bar.write(json.dumps(vars(kill)), file=sys.stderr)
            bar.update()

        return kills(folder, count, commands, tell)


def _file_operations(folder: Path, quick: bool) -> dict[str, int]:
    from faults_saves import file_operations

    with tqdm(desc="file operations") as bar:
        return file_operations(folder, bar.update)


def _resizes(folder: Path, quick: bool) -> dict[str, Any]:
    from faults_resizes import resizes

    with tqdm(desc="resizes", unit="run") as bar:
        return resizes(folder, quick, bar.update)


def _hosts(folder: Path, quick: bool) -> dict[str, int] | None:
    from faults_hosts import hosts
    from network_hosts import missing

    if lacking := missing():
        print(f"hosts: this machine lacks {', '.join(lacking)}", file=sys.stderr)
        return None
    return hosts(quick)


def _corrupted(folder: Path, quick: bool) -> dict[str, int]:
    from faults_saves import corrupted

    count = 30 if quick else 300
    with tqdm(total=count, desc="corrupted") as bar:
        return corrupted(folder, count, bar.update)


def _save(folder: Path, quick: bool) -> dict[str, float]:
    from faults_saves import save

    return save(folder, quick)


PARTS: dict[str, Callable[[Path, bool], Any]] = {
    "kills": _kills,
    "file_operations": _file_operations,
    "resizes": _resizes,
    "hosts": _hosts,
    "corrupted": _corrupted,
    "save": _save,
}


if __name__ == "__main__":
    main()
