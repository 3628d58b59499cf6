"""`recyclable store`: adapted weights by name, in a directory that any number of processes share."""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

from recyclable.commands.parts.command import Command, Group, add_json, add_store, end, tell
from recyclable.errors import InputError


class StoreCommand(Command):
    """A verb on one store."""

    def arguments(self, parser: argparse.ArgumentParser) -> None:
        add_store(parser)
        add_json(parser)


class Add(StoreCommand):
    """What comes in."""

    text = "a tuned checkpoint or a PEFT adapter with its base, or a run of recyclable's"

    def arguments(self, parser: argparse.ArgumentParser) -> None:
        super().arguments(parser)
        parser.add_argument("--tuned", required=True, type=Path, metavar="DIR")
        parser.add_argument("--base", metavar="DIR", help="what it was tuned on; a run of recyclable's knows")
        parser.add_argument("--name", required=True, metavar="N")
        text = "of the difference: exact (default), bf16, lowrank or 1bit"
        parser.add_argument("--codec", metavar="C", help=text)
        parser.add_argument("--rank", type=int, metavar="R", help="of lowrank (default 16)")
        text = "the task, for the labels' names where the weights have none"
        parser.add_argument("--task", metavar="T", help=text)
        text = "names in the order of the head's rows, where no file tells them"
        parser.add_argument("--labels", metavar="A,B,...", type=_names, help=text)
        text = "tokens that texts were cut at, where no file tells it"
        parser.add_argument("--max-length", type=int, metavar="N", help=text)
        text = "what read the texts it was tuned on, where DIR of --tuned has none (default: the base's)"
        parser.add_argument("--tokenizer", type=Path, metavar="DIR", help=text)

    def run(self, arguments: argparse.Namespace) -> int:
        from recyclable.recipes.store import add
        from recyclable.recipes.tuned_elsewhere import Told
        from recyclable.weights.delta import Codec
        from recyclable.weights.store import Store

        codec = Codec.asked(arguments.codec, arguments.rank, "--rank")
        store = Store(arguments.store)
        told = Told.asked(arguments.labels, arguments.max_length, arguments.tokenizer)
        asked = {"codec": codec, "task": arguments.task, "told": told}
        added = add(store, arguments.name, arguments.tuned, arguments.base, **asked)
        cut = f"texts are cut at {added['max_length']} tokens" if added["max_length"] else "texts are never cut"
        tell(f"added {arguments.name} to {store.folder}: {added['mb']:.2f} MB; {cut}")
        end(arguments, added)
        return 0


class Ls(StoreCommand):
    """A table."""

    text = "what is there"

    def run(self, arguments: argparse.Namespace) -> int:
        from recyclable.recipes.store_list import rows
        from recyclable.report.compare import table
        from recyclable.weights.store import Store

        store = Store(arguments.store)
        found = rows(store)
        columns = ("name", "task", "base", "tuning", "method", "codec", "mb", "score")
        tell(table(found, columns) if found else f"{store.folder} is empty")
        end(arguments, {"store": str(store.folder), "entries": found})
        return 0


class Similar(StoreCommand):
    """A ranking."""

    text = "rank entries by how well they would start a task, without training"

    def arguments(self, parser: argparse.ArgumentParser) -> None:
        super().arguments(parser)
        parser.add_argument("--task", required=True, metavar="T", help="task directory or file")
        parser.add_argument("--base", required=True, metavar="B", help="the model it will be tuned on")
        text = "training examples used (default 200)"
        parser.add_argument("--examples", type=int, default=200, metavar="N", help=text)

    def run(self, arguments: argparse.Namespace) -> int:
        from recyclable.recipes.similar import similar
        from recyclable.report.compare import table
        from recyclable.weights.store import Store

        store = Store(arguments.store)
        found = similar(store, arguments.task, arguments.base, arguments.examples)
        tell(table([row for row in found if "left_out" not in row]))
        for row in found:
            if "left_out" in row:
                tell(f"{row['name']}: left out: {row['left_out']}")
        said = {"store": str(store.folder), "task": arguments.task, "base": arguments.base, "entries": found}
        end(arguments, said)
        return 0


class Show(StoreCommand):
    """One entry."""

    text = "task, base and its lineage, size, loss and scores of one entry"

    def arguments(self, parser: argparse.ArgumentParser) -> None:
        super().arguments(parser)
        parser.add_argument("name", metavar="N")
        parser.add_argument("--base", metavar="B", help="say how this base is related to the entry's")

    def run(self, arguments: argparse.Namespace) -> int:
        from recyclable.recipes.store_show import show
        from recyclable.weights.store import Store

        shown = show(Store(arguments.store), arguments.name, arguments.base)
        origin = (shown["recycled_from"] or {}).get("weights")
        told = {**shown, "lineage": " <- ".join(shown["lineage"]), "recycled_from": origin, "base": None}
        if arguments.base is not None:
            told["relation"] = shown["relation"] or f"none: {arguments.base} does not descend from its base"
        for key, value in told.items():
            if value is not None:
                tell(f"{key:14}{value:.4g}" if isinstance(value, float) else f"{key:14}{value}")
        end(arguments, shown)
        return 0


class Verify(StoreCommand):
    """Whether every bit is as it was written."""

    text = "find any flipped bit; exit status 2 names what is damaged"

    def arguments(self, parser: argparse.ArgumentParser) -> None:
        super().arguments(parser)
        parser.add_argument("names", nargs="*", metavar="N", help="default: all")

    def run(self, arguments: argparse.Namespace) -> int:
        from recyclable.recipes.store import verify
        from recyclable.weights.store import Store

        store = Store(arguments.store)
        found = verify(store, arguments.names)
        for name, problems in found.items():
            tell(f"{name}: {'; '.join(problems) or 'whole'}")
        end(arguments, {"store": str(store.folder), "entries": found})
        if damaged := [problem for problems in found.values() for problem in problems]:
            raise InputError(store.folder, f"damaged: {'; '.join(damaged)}")
        return 0


class Export(StoreCommand):
    """What goes out."""

    text = "a plain transformers or PEFT directory"

    def arguments(self, parser: argparse.ArgumentParser) -> None:
        super().arguments(parser)
        parser.add_argument("name", metavar="N")
        form = parser.add_mutually_exclusive_group(required=True)
        form.add_argument("--merged", action="store_true", help="base and weights in one model, for transformers")
        form.add_argument("--peft", action="store_true", help="the adapter, for peft")
        text = "the model they go on: their own base or a descendant"
        parser.add_argument("--base", required=True, metavar="B", help=text)
        parser.add_argument("--out", required=True, type=Path, metavar="DIR")
        parser.add_argument("--old-base", metavar="A", help="their own base, if the recorded names lead nowhere")
        text = "use a base that is no descendant; it is recorded"
        parser.add_argument("--allow-unrelated", action="store_true", help=text)

    def run(self, arguments: argparse.Namespace) -> int:
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
        tell(f"export: done, see {arguments.out}")
        end(arguments, {"out": str(arguments.out)})
        return 0


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in next(csv.reader([text], skipinitialspace=True), []))


TEXT = "adapted weights by name: a directory that any number of processes share"
VERBS = {"add": Add(), "ls": Ls(), "similar": Similar(), "show": Show(), "verify": Verify(), "export": Export()}
COMMAND = Group(TEXT, 80, VERBS)
