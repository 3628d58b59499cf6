"""Another chat template of the base that weights go onto is told by every verb that puts them there, and recorded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from worlds import Chain, make_adapter, make_outdated, make_tokenizer, write_config

from recyclable import Store, carry
from recyclable.cli import main
from recyclable.weights.base import Base
from recyclable.weights.chat_template import chat_template_digest
from recyclable.weights.fingerprint import fingerprint
from recyclable.weights.lineage import ancestors, read_lineage

OLD, NEW = "{{ messages[0]['content'] }}", "w1 {{ messages[0]['content'] }}"


def with_template(folder: Path, template: str | None) -> Path:
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder


class World(Chain):
    """A base with one chat template, its upgrade with another; a delta and a LoRA of the base."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        with_template(self.base, OLD)
        with_template(self.upgraded, NEW)
        self.weights = make_outdated(self.base, self.task, folder / "weights")
        self.lora = make_adapter(self.base, self.task, folder / "lora", "lora")
        self.digests = {"old": chat_template_digest(self.base), "new": chat_template_digest(self.upgraded)}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("templates"))


@pytest.fixture
def said(capsys: pytest.CaptureFixture):
    """The notices of a verb that ends well."""

    def run(*command: object) -> list[str]:
        capsys.readouterr()
        assert main([str(part) for part in command]) == 0
        return [line for line in capsys.readouterr().out.splitlines() if "chat template" in line]

    return run


def recycled(world: World, out: Path, base: Path, **settings) -> list[object]:
    given = {"method": "apply", "weights": world.weights, "old_base": world.base, "base": base, "task": world.task}
    return ["recycle", write_config(out.with_suffix(".yaml"), {**given, "out": out, **settings})]


def test_recycling_tells_and_records_it(world: World, said, tmp_path: Path) -> None:
    (line,) = said(*recycled(world, tmp_path / "r", world.upgraded))
    old, new = (world.digests[side][:12] for side in ("old", "new"))
    where = f"another chat template: {world.base} has {old}, {world.upgraded} has {new}"
    assert line == f"notice: {world.weights}: {where}; the new base's is used"
    origin = json.loads((tmp_path / "r" / "manifest.json").read_text())["recycled_from"]
    assert origin["chat_template"] == {**world.digests, "used": "base"}
    assert origin["base"]["fingerprint"]["chat_template"] == world.digests["old"]


def test_nothing_is_told_where_the_templates_are_the_same(world: World, said, tmp_path: Path) -> None:
    same = with_template(Path(shutil.copytree(world.upgraded, tmp_path / "same")), OLD)
    assert said(*recycled(world, tmp_path / "r", same)) == []
    assert "chat_template" not in json.loads((tmp_path / "r" / "manifest.json").read_text())["recycled_from"]
    assert said("evaluate", "--weights", world.weights, "--base", world.base, "--task", world.task) == []


def test_apply_tells_and_records_it(world: World, said, tmp_path: Path) -> None:
    for weights, out in ((world.weights, tmp_path / "merged"), (world.lora, tmp_path / "peft")):
        assert len(said("apply", "--weights", weights, "--base", world.upgraded, "--out", out)) == 1
        (origin,) = json.loads((out / "recycled.json").read_text())["weights"]
        assert origin["chat_template"] == {**world.digests, "used": "base"}
    manifest = json.loads((tmp_path / "peft" / "manifest.json").read_text())
    assert manifest["recycled_from"]["chat_template"] == origin["chat_template"]
    assert manifest["base"]["fingerprint"]["chat_template"] == world.digests["new"]


def test_evaluate_and_carry_tell_it(world: World, said, capsys: pytest.CaptureFixture) -> None:
    asked = ("evaluate", "--weights", world.weights, world.lora, "--base", world.upgraded, "--task", world.task)
    assert [line.split(": ")[1] for line in said(*asked)] == [str(world.weights), str(world.lora)]
    carry(world.weights, to=world.upgraded)
    assert "another chat template" in capsys.readouterr().out


def test_probe_tells_and_records_it(world: World, said, tmp_path: Path) -> None:
    asked = ("--weights", world.weights, "--base", world.upgraded, "--out", tmp_path / "probe")
    assert len(said("probe", *asked)) == 1
    found = json.loads((tmp_path / "probe" / "probe.json").read_text())
    assert found["chat_template"] == {**world.digests, "used": "base"}


def test_of_each_entry_that_is_asked_for_a_start_it_is_told(world: World, said, tmp_path: Path) -> None:
    Store(tmp_path / "store").add("one", world.weights, str(world.base))
    asked = ("--task", world.task, "--base", world.upgraded, "--store", tmp_path / "store")
    assert len(said("store", "similar", *asked)) == 1


def test_a_base_that_lost_its_template_is_told_of(world: World, said, tmp_path: Path) -> None:
    none = with_template(Path(shutil.copytree(world.upgraded, tmp_path / "none")), None)
    (line,) = said(*recycled(world, tmp_path / "r", none))
    assert f"{none} has none" in line
    origin = json.loads((tmp_path / "r" / "manifest.json").read_text())["recycled_from"]
    assert origin["chat_template"] == {"old": world.digests["old"], "new": None, "used": "base"}


def test_of_an_older_manifest_the_old_base_itself_says_it(world: World, said, tmp_path: Path) -> None:
    aged = Path(shutil.copytree(world.weights, tmp_path / "aged"))
    content = json.loads((aged / "manifest.json").read_text())
    del content["base"]["fingerprint"]["chat_template"]
    (aged / "manifest.json").write_text(json.dumps(content))
    assert len(said(*recycled(world, tmp_path / "r", world.upgraded, weights=aged))) == 1
    asked = ("evaluate", "--weights", aged, "--base", world.upgraded, "--task", world.task)
    assert said(*asked) == [], "not known, and the old base is not asked for"


def test_weights_that_brought_a_tokenizer_keep_its_template(world: World, said, tmp_path: Path) -> None:
    checkpoint, store = tmp_path / "tuned", ("--store", tmp_path / "store")
    assert main(["apply", "--weights", str(world.weights), "--base", str(world.base), "--out", str(checkpoint)]) == 0
    own = make_tokenizer()
    own.chat_template = "own {{ messages[0]['content'] }}"
    own.save_pretrained(checkpoint)
    said("store", "add", "--tuned", checkpoint, "--base", world.base, "--name", "n", *store)
    out = tmp_path / "out"
    (line,) = said("store", "export", "n", "--merged", "--base", world.upgraded, "--out", out, *store)
    assert line.endswith("the weights' own is used, with their tokenizer")
    assert chat_template_digest(out) == chat_template_digest(checkpoint)
    (origin,) = json.loads((out / "recycled.json").read_text())["weights"]
    assert origin["chat_template"] == {**world.digests, "used": "weights"}


def test_a_declared_parent_with_another_template_is_told_and_recorded(world: World, said, tmp_path: Path) -> None:
    child = Path(shutil.copytree(world.upgraded, tmp_path / "child"))
    (child / "lineage.json").unlink()
    (line,) = said("lineage", "declare", child, "--parent", world.base)
    assert line == f"notice: {child} has another chat template than {world.base}; it is recorded"
    record = read_lineage(child)
    assert record["fingerprint"]["chat_template"] == world.digests["new"]
    (parent,) = ancestors(child, fingerprint(Base(child)).weights)
    assert parent["fingerprint"]["chat_template"] == world.digests["old"]
    (shown,) = said("lineage", "show", child)
    assert shown.endswith(f"(had another chat template than {child})")
