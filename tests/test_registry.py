"""What an installed package brings is a whole class of the room, which bears the name that its entry point has."""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from recyclable import registry
from recyclable.errors import InputError
from recyclable.lm import LMKind
from recyclable.methods import Method
from recyclable.tasks import TaskKind

PROTOCOLS = {"tasks": ("problem", TaskKind), "methods": ("method", Method), "lm": ("lm", LMKind)}
TASK = "from recyclable.tasks.regression import Regression\nclass New(Regression):\n    "
LM = "from typing import Literal\nfrom recyclable.lm.masked import Masked\nclass New(Masked):\n    "
METHOD = "from typing import Literal\nfrom recyclable.methods.init import Init\nclass New(Init):\n    "


def brought(room: str, source: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> type:
    """The class that an entry point `new` brings from a module of this source."""
    (folder / "bringing.py").write_text(source)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "bringing", raising=False)
    point = EntryPoint("new", "bringing:New", f"recyclable.{room}")
    monkeypatch.setattr(registry, "entry_points", lambda group: [point] if group == point.group else [])
    noun, protocol = PROTOCOLS[room]
    return registry.Registry(point.group, noun, lambda: protocol).get("new")


@pytest.mark.parametrize(
    ("room", "source", "said"),
    [
        ("tasks", f"{TASK}name = 'old'", "has name 'old', expected name: 'new'"),
        ("tasks", f"{TASK}pass", "has name 'regression', expected name: 'new'"),
        ("tasks", "from recyclable.tasks import TaskKind as New", "is abstract, expected a class that has "),
        ("methods", f"{METHOD}pass", "has method 'init', expected method: Literal"),
        ("methods", f"{METHOD}method: str", "has no method, expected method: Literal"),
        ("methods", f"{METHOD}method: str = 'new'", "has no method, expected method: Literal"),
        ("methods", "from recyclable.methods import Method as New", "is abstract, expected a class that has "),
        ("lm", f"{LM}lm: Literal['old'] = 'old'", "has lm 'old', expected lm: Literal"),
        ("lm", "raise SystemExit('bye')", "cannot be loaded from bringing:New (SystemExit: bye)"),
        ("lm", "New = int", "is no LMKind"),
    ],
)
def test_a_class_that_cannot_be_used_by_its_name_is_refused(
    room: str, source: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError) as refused:
        brought(room, source, tmp_path, monkeypatch)
    assert str(refused.value).startswith(f"{PROTOCOLS[room][0]} 'new': ") and "bringing:New" in str(refused.value)
    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("tasks", f"{TASK}name = 'new'"),
        ("methods", f"{METHOD}method: Literal['new'] = 'new'"),
        ("lm", f"{LM}lm: Literal['new'] = 'new'"),
    ],
)
def test_a_class_of_its_entry_points_name_is_loaded(
    room: str, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert brought(room, source, tmp_path, monkeypatch).__module__ == "bringing"
