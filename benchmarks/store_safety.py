"""How safe the store is: flipped bits that `verify` finds, malformed files that end in one clear line.

python benchmarks/store_safety.py [--quick] [--json]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import malformed
import torch
from peft import LoraConfig, get_peft_model
from transformers import BertConfig, BertForSequenceClassification, BertModel

from recyclable.carrying.changes import FoundChanges
from recyclable.errors import InputError
from recyclable.recipes.apply import apply
from recyclable.recipes.store import add
from recyclable.weights.digest import file_digest
from recyclable.weights.manifest import ADAPTER, ADAPTER_CONFIG, DELTA, HEAD, MANIFEST, SEAL
from recyclable.weights.store import Store

TIME_LIMIT_S = 10
MEMORY_LIMIT = 2 << 30
"""Address space that one malformed file may cost beyond what the process has (bytes)."""
MODEL, INDEX = "model.safetensors", "model.safetensors.index.json"


def main() -> None:
    """Measure, print one line each or one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a fifth of the cases")
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    arguments = parser.parse_args()
    result = {"flips": flips(arguments.quick), "fuzz": fuzz(arguments.quick)}
    for section, figures in result.items():
        print(f"{section:6} {json.dumps(figures)}")
    if arguments.json:
        print(json.dumps(result))


def make_world(root: Path) -> None:
    """A base, a checkpoint tuned on it (one file, and sharded), a LoRA adapter, and a store with both."""
    config = BertConfig(
        vocab_size=100,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        BertModel(config).save_pretrained(root / "base")
        model = BertForSequenceClassification.from_pretrained(root / "base", num_labels=3)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.02 * torch.randn(parameter.shape)
        model.save_pretrained(root / "tuned")
        model.save_pretrained(root / "sharded", max_shard_size="10KB")
        plain = BertForSequenceClassification.from_pretrained(root / "base", num_labels=3)
        adapter = get_peft_model(plain, LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"]))
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter += 0.02 * parameter.requires_grad
        adapter.save_pretrained(root / "adapter")
    store = Store(root / "store")
    add(store, "delta", root / "tuned", str(root / "base"))
    add(store, "adapter", root / "adapter", str(root / "base"))


def flips(quick: bool = False) -> dict[str, int]:
    """Flip one bit at a time in the files of store entries: {"tried", "found"}; found is what `verify` names.

    Half of them fall anywhere, so that large files get more, half in a file drawn with equal chances.
    """
    draw, tried, found = random.Random(0), 200 if quick else 1000, 0
    with tempfile.TemporaryDirectory() as folder:
        make_world(Path(folder))
        store = Store(Path(folder) / "store")
        files = sorted(path for name in store.names() for path in store.path(name).iterdir())
        sizes = [path.stat().st_size for path in files]
        for number in range(tried):
            path = draw.choices(files, sizes if number % 2 else None)[0]
            whole = path.read_bytes()
            place, bit = draw.randrange(len(whole)), draw.randrange(8)
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
            named = {MANIFEST, path.name} if path.name == SEAL else {path.name}
            found += any(str(path.with_name(n)) in p for n in named for p in store.damage(path.parent.name))
            path.write_bytes(whole)
        if any(store.damage(name) for name in store.names()):
            raise AssertionError("an entry was left damaged, so that finding more says nothing")
    return {"tried": tried, "found": found}


def fuzz(quick: bool = False, count: int | None = None, commands: int | None = None) -> dict[str, Any]:
    """Malformed files, each given to the verb that reads it: {"tried", "clear_errors", ...}.

    A clear error is an InputError of one printable line within the limits of time and memory, after which nothing was
    written and no pickle opened; a few also go through the command, which must end with status 2.

    Args:
        count: files; by default 200, or 40 if quick.
        commands: how many go through the command; by default 5, or 2 if quick.
    """
    draw, count, failures, slowest = random.Random(2), count or (40 if quick else 200), [], 0.0
    with tempfile.TemporaryDirectory() as folder, _limited():
        root = Path(folder)
        make_world(root)
        every = [(target, way) for target in _targets() for way in malformed.ways(target[1])]
        drawn = [draw.sample(every, min(count - begin, len(every))) for begin in range(0, count, len(every))]
        chosen = [case for some in drawn for case in some]
        for number, ((source, file, read), way) in enumerate(chosen):
            here = root / "cases" / str(number)
            shutil.copytree(root / source, here / "given")
            way.spoil(random.Random(number), here / "given" / file)
            if source == "store/delta":
                _forge(here / "given", file)
            start = time.perf_counter()
            problem = _clear(lambda read=read, here=here: read(root, here / "given", here / "made"))
            slowest = max(slowest, time.perf_counter() - start)
            if (here / "made").exists():
                problem = "something was written"
            if malformed.MARK in os.environ:
                problem = "a pickle was opened"
            if problem:
                failures.append(f"{source}/{file}, {way.what}, seed {number}: {problem}")
        sample = draw.sample(range(count), commands or (2 if quick else 5))
        for i in sample:
            if (status := _command(root, root / "cases" / str(i) / "given", chosen[i][0][0])) != 2:
                failures.append(f"the command ended with {status}: {chosen[i][0][0]}, {chosen[i][1].what}")
    for failure in failures:
        print(f"not clear: {failure}", file=sys.stderr)
    clear = count - len(failures)
    return {"tried": count, "clear_errors": clear, "slowest_s": round(slowest, 2), "commands": len(sample)}


def _targets() -> list[tuple[str, str, Callable[[Path, Path, Path], Any]]]:
    """(directory that is whole, file to spoil, who reads it: world, spoiled directory, result's place)."""

    def import_as(name: str) -> Callable[[Path, Path, Path], Any]:
        return lambda root, given, made: add(Store(made), name, given, str(root / "base"))

    def import_on(root: Path, given: Path, made: Path) -> None:
        add(Store(made), "entry", root / "tuned", str(given))

    def put_on(root: Path, given: Path, made: Path) -> None:
        apply([given], root / "base", made, FoundChanges())

    return [
        ("tuned", MODEL, import_as("a")),
        ("sharded", INDEX, import_as("d")),
        ("base", MODEL, import_on),
        ("adapter", ADAPTER, import_as("b")),
        ("store/delta", DELTA, put_on),
        ("store/delta", HEAD, put_on),
        ("store/delta", MANIFEST, put_on),
        ("adapter", ADAPTER_CONFIG, import_as("c")),
    ]


def _forge(folder: Path, spoiled: str) -> None:
    """Whoever spoils an entry on purpose also writes digests that fit; only the rest of the checks is left."""
    (folder / SEAL).unlink()
    if spoiled != MANIFEST and (folder / spoiled).is_file() and not (folder / spoiled).is_symlink():
        manifest = json.loads((folder / MANIFEST).read_text())
        try:
            manifest["files"][spoiled] = file_digest(folder / spoiled)
        except InputError:
            return
        (folder / MANIFEST).write_text(json.dumps(manifest))


def _clear(work: Callable[[], Any]) -> str | None:
    """What was wrong with how `work` ended; None for a clear error."""

    def too_late(*_: Any) -> None:
        raise TimeoutError(f"no end after {TIME_LIMIT_S} s")

    before = signal.signal(signal.SIGALRM, too_late)
    signal.setitimer(signal.ITIMER_REAL, TIME_LIMIT_S)
    try:
        work()
        return "was accepted"
    except InputError as error:
        line = str(error)
        return None if line.isprintable() and len(line) > 20 else f"not one clear line: {line!r}"
    except BaseException as error:
        return f"{type(error).__name__}: {error} at {traceback.extract_tb(error.__traceback__)[-1]}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def _limited() -> Iterator[None]:
    """No more address space than now and MEMORY_LIMIT: a huge allocation fails instead of passing unseen."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_LIMIT, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def _command(root: Path, given: Path, source: str) -> int:
    """Exit status of the command that would read the spoiled directory."""
    base = given if source == "base" else root / "base"
    tuned = ["--tuned", str(root / "tuned" if source == "base" else given), "--base", str(base), "--name", "x"]
    put_on = ["apply", "--weights", str(given), "--base", str(root / "base"), "--out", str(given.parent / "made")]
    verb = put_on if source == "store/delta" else ["store", "add", "--store", str(given.parent / "made"), *tuned]
    ended = subprocess.run([sys.executable, "-m", "recyclable.cli", *verb], capture_output=True, timeout=600)
    return ended.returncode


if __name__ == "__main__":
    main()
