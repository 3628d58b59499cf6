"""A base's chat template is part of its fingerprint, whatever file it lies in; in older records it is not known."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer
from worlds import make_base

from recyclable.weights.base import Base
from recyclable.weights.chat_template import chat_template_digest, chat_templates
from recyclable.weights.fingerprint import UNKNOWN, Fingerprint, fingerprint
from recyclable.weights.lineage import is_fingerprint
from recyclable.weights.remembered import stamp

TEMPLATE = "{% for m in messages %}\n{{ m['content'] }} é{% endfor %}\n"
TOOLS = "{{ tools }}"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("templates") / "base", layers=1)


@pytest.fixture
def copy(base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(base, tmp_path / "copy"))


def in_settings(folder: Path, template: object) -> None:
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": template}))


def beside(folder: Path, template: str) -> None:
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def additional(folder: Path, **templates: str) -> None:
    (folder / "additional_chat_templates").mkdir()
    for name, template in templates.items():
        (folder / "additional_chat_templates" / f"{name}.jinja").write_text(template)


def as_transformers(folder: Path) -> dict[str, str]:
    found = AutoTokenizer.from_pretrained(folder).chat_template
    return found if isinstance(found, dict) else {} if found is None else {"default": found}


def test_there_is_none_where_no_file_has_one(copy: Path) -> None:
    for said in (None, [], 5, [{"name": "default"}], ["x"]):
        assert chat_template_digest(copy) is None and chat_templates(copy) == {}
        in_settings(copy, said)
    (copy / "tokenizer_config.json").write_text("{")
    assert chat_template_digest(copy) is None


LAYOUTS = {
    "settings": lambda folder: in_settings(folder, TEMPLATE),
    "list": lambda folder: in_settings(folder, [{"name": "default", "template": TEMPLATE}]),
    "file": lambda folder: beside(folder, TEMPLATE),
    "file before settings": lambda folder: (beside(folder, TEMPLATE), in_settings(folder, "other")),
    "returns": lambda folder: beside(folder, TEMPLATE.replace("\n", "\r\n")),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_template_is_the_same_wherever_it_lies(copy: Path, base: Path, layout: str) -> None:
    LAYOUTS[layout](copy)
    assert as_transformers(copy) == chat_templates(copy) == {"default": TEMPLATE}
    found, without = fingerprint(Base(copy)), fingerprint(Base(base))
    assert found.chat_template == chat_template_digest(copy) != without.chat_template is None
    copy_of_copy = copy.parent / "again"
    AutoTokenizer.from_pretrained(copy).save_pretrained(copy_of_copy)
    assert chat_template_digest(copy_of_copy) == found.chat_template


def test_what_a_processor_alone_reads_counts_where_nothing_else_does(copy: Path) -> None:
    (copy / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    assert chat_templates(copy) == {"default": TEMPLATE}
    in_settings(copy, "other")
    assert chat_templates(copy) == as_transformers(copy) == {"default": "other"}


def test_several_templates_are_told_apart_by_name_and_content(copy: Path, base: Path) -> None:
    beside(copy, TEMPLATE)
    alone = chat_template_digest(copy)
    additional(copy, tools=TOOLS)
    both = chat_template_digest(copy)
    assert chat_templates(copy) == as_transformers(copy) == {"default": TEMPLATE, "tools": TOOLS}
    before = stamp(copy)
    (copy / "additional_chat_templates" / "tools.jinja").write_text(TOOLS + "!")
    assert len({alone, both, chat_template_digest(copy)}) == 3
    assert stamp(copy) != before, "a remembered fingerprint holds no longer"
    named = shutil.copytree(base, copy.parent / "named")
    in_settings(named, [{"name": "tools", "template": TOOLS}, {"name": "default", "template": TEMPLATE}])
    assert chat_templates(named) == as_transformers(named) and chat_template_digest(named) == both


def test_another_template_makes_no_other_base(copy: Path, base: Path) -> None:
    beside(copy, TEMPLATE)
    assert fingerprint(Base(copy)) == fingerprint(Base(base))
    assert fingerprint(Base(copy)).as_dict() != fingerprint(Base(base)).as_dict()


def test_a_record_from_before_is_a_base_whose_template_is_not_known(copy: Path) -> None:
    beside(copy, TEMPLATE)
    now = fingerprint(Base(copy)).as_dict()
    was = {name: digest for name, digest in now.items() if name != "chat_template"}
    read = Fingerprint.recorded(was, Base(copy))
    assert read == fingerprint(Base(copy)) and read.chat_template == UNKNOWN and read.as_dict() == was
    assert is_fingerprint(now) and is_fingerprint(was) and is_fingerprint({**was, "chat_template": None})
    assert not is_fingerprint({**was, "chat_template": 5}) and not is_fingerprint({**now, "more": "x"})
