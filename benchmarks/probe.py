"""How long a probe of weights alone takes, over reading its files: `cat` of both bases and the weights.

    python benchmarks/probe.py [--layers N] [--repeats N] [--json]

Files are read anew from the disk (dropped from the page cache before each run), and once more from the page cache.
Probe and `cat` take turns; imports are left out. Wall time is what counts; processor time, of all threads, is told
beside it, since a busy machine stretches the one and not the other.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from big_models import make_world

from recyclable.config.run_file import make_config
from recyclable.recipes.probe import probe
from recyclable.recipes.probe_settings import ProbeSettings


def main() -> None:
    """Measure, print a line per cache state, or one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=10, help="of 50 MB in each of the three files (default 10)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    parser.add_argument("--scratch", type=Path, help="where models are written (default: the temporary directory)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as folder:
        world = make_world(Path(folder) / "world", arguments.layers, vocabulary=1000)
        result = {state: measure(world, arguments.repeats, state == "disk") for state in ("disk", "page cache")}
    for state, figures in result.items():
        print(f"{state:10} {json.dumps(figures)}")
    if arguments.json:
        print(json.dumps(result))


def measure(world: Path, repeats: int, cold: bool) -> dict[str, float]:
    """Medians in seconds, of wall and of processor time, and the ratios of probe to reading."""
    files = [world / base / "model.safetensors" for base in ("old", "new")]
    files += sorted((world / "weights").glob("*.safetensors"))
    config = make_config(ProbeSettings, {"weights": str(world / "weights"), "base": str(world / "new")}, "benchmark")
    read, probed = [], []
    for _ in range(repeats + 1):
        for times, work in ((read, lambda: _cat(files)), (probed, lambda: probe(config))):
            for file in files if cold else ():
                _forget(file)
            times.append(_timed(work))
    wall_read, wall_probe = (statistics.median(t[0] for t in times[1:]) for times in (read, probed))
    cpu_read, cpu_probe = (statistics.median(t[1] for t in times[1:]) for times in (read, probed))
    figures = {
        "gb": sum(file.stat().st_size for file in files) / 1e9,
        "read_s": wall_read,
        "probe_s": wall_probe,
        "ratio": wall_probe / wall_read,
        "read_cpu_s": cpu_read,
        "probe_cpu_s": cpu_probe,
    }
    return {name: round(value, 3) for name, value in figures.items()}


def _cat(files: list[Path]) -> None:
    with open(os.devnull, "wb") as nowhere:
        subprocess.run(["cat", *map(str, files)], check=True, stdout=nowhere)


def _forget(file: Path) -> None:
    handle = os.open(file, os.O_RDONLY)
    os.fsync(handle)
    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(handle)


def _timed(work: Callable[[], object]) -> tuple[float, float]:
    """(wall, processor) seconds, of this process and its children."""

    def processor() -> float:
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(u.ru_utime + u.ru_stime for u in used)

    wall, busy = time.perf_counter(), processor()
    work()
    return time.perf_counter() - wall, processor() - busy


if __name__ == "__main__":
    main()
