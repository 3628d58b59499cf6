"""The tests mirror the rooms of recyclable/, and none of them leans on another."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from processes import ROOT

TESTS = ROOT / "tests"
ROOMS = {path.parent.name for path in (ROOT / "recyclable").glob("*/__init__.py")}
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
    # what is of no module: this file, and what holds the documentation and its example of a plug-in
    beside = {Path(f"test_{name}.py") for name in {*MODULES, "layout", "documentation", "plugin"}}
    assert FILES and [str(file) for file in FILES if file not in beside and file.parent.as_posix() not in ROOMS] == []


def test_rooms_import_down_the_list_of_the_architecture_page() -> None:
    rooms = re.findall(r"^\| `(\w+)/` \|", (ROOT / "docs" / "architecture.md").read_text(), flags=re.MULTILINE)
    assert set(rooms) == ROOMS and len(rooms) == len(ROOMS)
    upwards = []
    for depth, room in enumerate(rooms):
        for path in (ROOT / "recyclable" / room).rglob("*.py"):
            taken = {name.split(".")[1] for name in imported(path.read_text()) if name.startswith("recyclable.")}
            upwards += [(path.name, other) for other in taken & set(rooms[:depth])]
    assert upwards == []


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
