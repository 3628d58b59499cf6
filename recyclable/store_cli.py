"""The `recyclable store` commands: parses and dispatches, nothing else."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from recyclable.errors import InputError


def add_store_argument(parser: argparse.ArgumentParser) -> None:
    """`--store`, for every verb that takes adapted weights."""
    parser.add_argument("--store", metavar="S", help="the store's directory (default: RECYCLABLE_STORE or ./store)")


def add_parsers(verbs: argparse._SubParsersAction) -> None:
    """`recyclable store` and its verbs."""
    text = "adapted weights by name: a directory that any number of processes share"
    inner = verbs.add_parser("store", help=text, description=text).add_subparsers(required=True, metavar="VERB")

    sub = _verb(inner, "add", _add, "a tuned checkpoint or a PEFT adapter with its base, or a run of recyclable's")
    sub.add_argument("--tuned", required=True, type=Path, metavar="DIR")
    sub.add_argument("--base", metavar="DIR", help="what it was tuned on; a run of recyclable's knows")
    sub.add_argument("--name", required=True, metavar="N")
    sub.add_argument("--codec", metavar="C", help="of the difference: exact (default), bf16, lowrank or 1bit")
    sub.add_argument("--rank", type=int, metavar="R", help="of lowrank (default 16)")
    sub.add_argument("--task", metavar="T", help="the task, for the labels' names where the weights have none")

    _verb(inner, "ls", _ls, "what is there")

    sub = _verb(inner, "similar", _similar, "rank entries by how well they would start a task, without training")
    sub.add_argument("--task", required=True, metavar="T", help="task directory or file")
    sub.add_argument("--base", required=True, metavar="B", help="the model it will be tuned on")
    sub.add_argument("--examples", type=int, default=200, metavar="N", help="training examples used (default 200)")

    sub = _verb(inner, "show", _show, "task, base and its lineage, size, loss and scores of one entry")
    sub.add_argument("name", metavar="N")
    sub.add_argument("--base", metavar="B", help="say how this base is related to the entry's")

    sub = _verb(inner, "verify", _verify, "find any flipped bit; exit status 2 names what is damaged")
    sub.add_argument("names", nargs="*", metavar="N", help="default: all")

    sub = _verb(inner, "export", _export, "a plain transformers or PEFT directory")
    sub.add_argument("name", metavar="N")
    form = sub.add_mutually_exclusive_group(required=True)
    form.add_argument("--merged", action="store_true", help="base and weights in one model, for transformers")
    form.add_argument("--peft", action="store_true", help="the adapter, for peft")
    sub.add_argument("--base", required=True, metavar="B", help="the model they go on: their own base or a descendant")
    sub.add_argument("--out", required=True, type=Path, metavar="DIR")
    sub.add_argument("--old-base", metavar="A", help="their own base, if the manifest's name for it leads nowhere")
    sub.add_argument("--allow-unrelated", action="store_true", help="use a base that is no descendant; it is recorded")


def _verb(inner: argparse._SubParsersAction, name: str, run, text: str) -> argparse.ArgumentParser:
    sub = inner.add_parser(name, help=text, description=text)
    add_store_argument(sub)
    sub.add_argument("--json", action="store_true", help="end with one JSON object")
    sub.set_defaults(run=run)
    return sub


def _add(arguments: argparse.Namespace) -> int:
    from recyclable.recipes.store import add
    from recyclable.weights.delta import Codec
    from recyclable.weights.store import Store

    if arguments.rank is not None and (arguments.codec != "lowrank" or arguments.rank < 1):
        raise InputError(
            "--rank", f"found {arguments.rank} with codec {arguments.codec}, expected 1 or more and lowrank"
        )
    codec = Codec(arguments.codec, arguments.rank or Codec.rank) if arguments.codec else None
    store = Store(arguments.store)
    added = add(store, arguments.name, arguments.tuned, arguments.base, codec=codec, task=arguments.task)
    print(f"added {arguments.name} to {store.folder}: {added['mb']:.2f} MB")
    _end(arguments, added)
    return 0


def _ls(arguments: argparse.Namespace) -> int:
    from recyclable.recipes.store import rows
    from recyclable.report.compare import table
    from recyclable.weights.store import Store

    store = Store(arguments.store)
    found = rows(store)
    columns = ("name", "task", "base", "tuning", "method", "codec", "mb", "score")
    print(table(found, columns) if found else f"{store.folder} is empty")
    _end(arguments, {"store": str(store.folder), "entries": found})
    return 0


def _similar(arguments: argparse.Namespace) -> int:
    from recyclable.recipes.similar import similar
    from recyclable.report.compare import table
    from recyclable.weights.store import Store

    store = Store(arguments.store)
    found = similar(store, arguments.task, arguments.base, arguments.examples)
    print(table([row for row in found if "left_out" not in row]))
    for row in found:
        if "left_out" in row:
            print(f"{row['name']}: left out: {row['left_out']}")
    _end(arguments, {"store": str(store.folder), "task": arguments.task, "base": arguments.base, "entries": found})
    return 0


def _show(arguments: argparse.Namespace) -> int:
    from recyclable.recipes.store import show
    from recyclable.weights.store import Store

    shown = show(Store(arguments.store), arguments.name, arguments.base)
    origin = (shown["recycled_from"] or {}).get("weights")
    told = {**shown, "lineage": " <- ".join(shown["lineage"]), "recycled_from": origin, "base": None}
    for key, value in told.items():
        if value is not None:
            print(f"{key:14}{value:.4g}" if isinstance(value, float) else f"{key:14}{value}")
    _end(arguments, shown)
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from recyclable.recipes.store import verify
    from recyclable.weights.store import Store

    store = Store(arguments.store)
    found = verify(store, arguments.names)
    for name, problems in found.items():
        print(f"{name}: {'; '.join(problems) or 'whole'}")
    _end(arguments, {"store": str(store.folder), "entries": found})
    if damaged := {name: problems for name, problems in found.items() if problems}:
        raise InputError(store.folder, f"damaged: {'; '.join(p for problems in damaged.values() for p in problems)}")
    return 0


def _export(arguments: argparse.Namespace) -> int:
    from recyclable.recipes.store import export
    from recyclable.weights.store import Store

    export(
        Store(arguments.store),
        arguments.name,
        arguments.base,
        arguments.out,
        merged=arguments.merged,
        old_base=arguments.old_base,
        allow_unrelated=arguments.allow_unrelated,
    )
    print(f"export: done, see {arguments.out}")
    _end(arguments, {"out": str(arguments.out)})
    return 0


def _end(arguments: argparse.Namespace, result: dict) -> None:
    if arguments.json:
        print(json.dumps(result))
