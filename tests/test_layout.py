"""The tests mirror the rooms of recyclable/, and none of them leans on another."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from processes import ROOT

TESTS = ROOT / "tests"
# Rooms that are being built: their tests have moved in before them.
PLANNED = {"architectures", "carrying", "commands", "config", "lm", "methods", "models", "tasks"}
ROOMS = {path.parent.name for path in (ROOT / "recyclable").glob("*/__init__.py")} | PLANNED
MODULES = {path.stem for path in (ROOT / "recyclable").glob("*.py")}
FILES = [path.relative_to(TESTS) for path in sorted(TESTS.rglob("test_*.py"))]


def imported(source: str) -> set[str]:
    """Every module that the source names in an import, and what it takes from one (which may be a module as well)."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module or "", *(f"{node.module or ''}.{name.name}" for name in node.names)}
    return found


def imported_tests(source: str) -> set[str]:
    """What the source imports that is a test, or is found by way of the folder of the tests."""
    return {name for name in imported(source) if name.split(".")[0] == "tests" or ".test_" in f".{name}"}


def test_every_test_lies_in_a_room_or_beside_a_module_that_has_none() -> None:
    beside = {Path(f"test_{name}.py") for name in {*MODULES, "layout"}}
    assert FILES and [str(file) for file in FILES if file not in beside and file.parent.as_posix() not in ROOMS] == []


def test_no_test_imports_another() -> None:
    assert {str(file): found for file in FILES if (found := imported_tests((TESTS / file).read_text()))} == {}


def test_what_is_shared_is_no_test() -> None:
    support = list((TESTS / "support").glob("*.py"))
    assert support and not [path.name for path in support if path.name.startswith("test_")]
    assert [path.name for path in support if imported_tests(path.read_text())] == []


@pytest.mark.parametrize(
    "line",
    [
        "from test_a import x",
        "import room.test_a",
        "from tests.room import x",
        "from room import test_a",
        "import tests",
    ],
)
def test_every_way_to_import_a_test_is_noticed(line: str) -> None:
    assert imported_tests(f"def inside():\n    {line}\n")
    assert imported_tests("from worlds import make_base\nimport latest_test\n") == set()
