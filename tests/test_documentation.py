"""README.md and docs/ name only commands, flags and keys that there are; their run configs are read as they stand."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from processes import ROOT

from recyclable.cli import parser
from recyclable.commands.parts.status import parse
from recyclable.config.settings import CorpusSettings
from recyclable.lm import LM_KINDS
from recyclable.machine import CHECKPOINTING_KEYS, KNOWN_KEYS, KNOWN_ZERO_KEYS
from recyclable.methods import METHODS
from recyclable.recipes.pretrain_settings import read_pretrain_settings
from recyclable.recipes.recycle_settings import read_recycle_settings
from recyclable.recipes.stack_settings import StackSettings, read_stack_settings
from recyclable.recipes.study_settings import (
    StudyBase,
    StudyEdge,
    StudyExperiment,
    StudyMethod,
    StudySettings,
    read_study_settings,
)
from recyclable.recipes.tune_settings import read_tune_settings, tune_settings
from recyclable.tasks import every_kind
from recyclable.tasks.parts.task_file import known_keys as keys_of_tasks
from recyclable.tunings import TUNINGS

DOCUMENTS = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md"), *ROOT.glob("*/README.md")])
FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
INLINE = re.compile(r"(?<!`)`([^`\n]+(?:\n[^`\n]+)?)`(?!`)")
READERS = {
    "method": read_recycle_settings,
    "corpus": read_pretrain_settings,
    "experiments": read_study_settings,
    "runs": read_stack_settings,
    "learning_rate": read_tune_settings,
}
# Flags that documents name of pytest, the deepspeed launcher and Slurm.
FOREIGN_FLAGS = {"--lf", "--ff", "--export"}


class Refused(Exception):
    """The parser does not know what it was given."""


class Strict(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise Refused(message)


def known_keys() -> set[str]:
    """Every key that any run config, task file or ds_config may have."""
    settings = [CorpusSettings, StackSettings, StudySettings, StudyBase, StudyEdge, StudyExperiment, StudyMethod]
    settings += [METHODS.get(name) for name in METHODS.names()] + [LM_KINDS.get(name) for name in LM_KINDS.names()]
    settings += [tune_settings(name) for name in TUNINGS.names()]
    known = {*keys_of_tasks(every_kind()), *KNOWN_KEYS, *KNOWN_ZERO_KEYS, *CHECKPOINTING_KEYS}
    return known | {key for each in settings for key in each.model_fields}


def blocks(document: Path) -> Iterator[tuple[str, str]]:
    """(language, text) of each fenced block."""
    return ((found[1], found[2]) for found in FENCED.finditer(document.read_text(encoding="utf-8")))


def commands(document: Path) -> Iterator[str]:
    """Each command line of a document that starts `recyclable`: of fenced blocks whole lines, else in back quotes."""
    for _, text in blocks(document):
        joined = re.sub(r"\\\n\s*", " ", text)
        for line in joined.splitlines():
            line = re.split(r"\s#", line)[0].strip()
            for part in line.split("&&"):
                words = part.split()
                if words and words[0].rpartition("/")[2] == "recyclable":
                    yield part.strip()
    outside = FENCED.sub("", document.read_text(encoding="utf-8"))
    for found in INLINE.finditer(outside):
        text = " ".join(found[1].split())
        if re.fullmatch(r"recyclable [a-z].*", text):
            yield text


def refusal(command: str) -> str | None:
    """What the parser says against a command line; a command without its required arguments is but a name."""
    argv = shlex.split(command.replace("...", ""))[1:]
    alternatives = [word.split("|") for word in argv]
    for argv in ([words[0] for words in alternatives], [words[-1] for words in alternatives]):
        whole = parser()
        for each in _all(whole):
            each.__class__ = Strict
            for one in (*each._actions, *each._mutually_exclusive_groups):
                one.required = False  # else it is missed before an unknown flag is noticed
        try:
            parse(whole, argv)
        except Refused as error:
            return str(error)
    return None


def _all(one: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    yield one
    for action in one._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                yield from _all(inner)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_are_known_to_the_parser(document: Path) -> None:
    refused = {command: found for command in commands(document) if (found := refusal(command))}
    assert not refused


def test_the_readme_names_every_verb_and_an_unknown_one_is_noticed() -> None:
    named = {command.split()[1] for command in commands(ROOT / "README.md")}
    verbs = {"quickstart", "pretrain", "tune", "recycle", "study", "evaluate", "apply", "probe", "store", "lineage"}
    assert verbs | {"generate", "methods", "tasks", "tunings", "lms", "plan", "doctor"} <= named
    assert "invalid choice" in refusal("recyclable plans --model M")
    assert "unrecognized" in refusal("recyclable apply --weights W --base B --out O --strength 2")
    assert "unrecognized" in refusal("recyclable apply --strength 2")
    assert "unrecognized" in refusal("recyclable store export x --foo")
    assert refusal("recyclable apply") is None


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_flags_in_back_quotes_are_those_of_some_command(document: Path) -> None:
    known = {flag for each in _all(parser()) for action in each._actions for flag in action.option_strings}
    outside = FENCED.sub("", document.read_text(encoding="utf-8"))
    for found in INLINE.finditer(outside):
        if found[1].startswith("--"):
            flags = set(re.findall(r"(?<!\S)--[\w-]+", found[1]))
            assert flags <= known | FOREIGN_FLAGS, f"{document.name}: `{found[1]}`"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_run_configs_are_read_as_they_stand(document: Path) -> None:
    for language, text in blocks(document):
        content: Any = yaml.safe_load(text) if language == "yaml" else None
        if isinstance(content, dict) and "train" not in content and "dataset" not in content:
            content = {"out": "out", **content}
            read = next(READERS[key] for key in READERS if key in content)
            read(content, document.name)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_keys_in_back_quotes_are_read_by_something(document: Path) -> None:
    known, outside = known_keys(), FENCED.sub("", document.read_text(encoding="utf-8"))
    for found in INLINE.finditer(outside):
        for key in re.findall(r"^([a-z][a-z0-9_]{2,})(?:: |=)\S", found[1]):
            assert key in known | {"key"}, f"{document.name}: `{found[1]}`"


def test_scripts_that_documents_start_are_there() -> None:
    for document in DOCUMENTS:
        for path in re.findall(r"(?:python |deepspeed .*)((?:benchmarks|launch)/[a-z_]+\.py)", document.read_text()):
            assert (ROOT / path).is_file(), f"{document.name}: {path}"
