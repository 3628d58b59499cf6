"""Lineage and provenance: which weights may go onto which base, and what is said when they may not."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from worlds import make_base, make_outdated, make_task, make_upgraded

from recyclable.cli import main
from recyclable.errors import InputError
from recyclable.weights.adapted import AdaptedWeights
from recyclable.weights.base import Base
from recyclable.weights.fingerprint import fingerprint
from recyclable.weights.lineage import FILE, ancestors_for_child, declare, read_lineage, relation
from recyclable.weights.provenance import require_descendant, require_own_base


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A base, its child and its grandchild."""
    root = tmp_path_factory.mktemp("chain")
    bases = [make_base(root / "m0")]
    for i in (1, 2):
        bases.append(make_upgraded(bases[-1], root / f"m{i}", seed=i))
    return bases


@pytest.fixture(scope="module")
def weights(chain: list[Path], tmp_path_factory: pytest.TempPathFactory) -> AdaptedWeights:
    root = tmp_path_factory.mktemp("weights")
    return AdaptedWeights(make_outdated(chain[0], make_task(root / "task"), root / "outdated"))


def digest(folder: Path) -> str:
    return fingerprint(Base(folder)).weights


def test_children_and_grandchildren_descend_and_parents_do_not(chain: list[Path]) -> None:
    for i, ancestor in enumerate(chain):
        for j, folder in enumerate(chain):
            expected = "own" if i == j else "recorded" if i < j else None
            assert relation(folder, digest(folder), digest(ancestor)) == expected, (i, j)


def test_a_child_of_a_child_names_both_nearest_first(chain: list[Path]) -> None:
    assert read_lineage(chain[0]) is None
    found = [a["fingerprint"]["weights"] for a in read_lineage(chain[2])["ancestors"]]
    assert found == [digest(chain[1]), digest(chain[0])]
    added = ancestors_for_child(chain[2], "m2", fingerprint(Base(chain[2])).as_dict())
    assert [a["fingerprint"]["weights"] for a in added] == [digest(chain[i]) for i in (2, 1, 0)]


def test_a_lineage_counts_only_for_the_weights_it_was_written_for(chain: list[Path], tmp_path: Path) -> None:
    stranger = make_base(tmp_path / "stranger", seed=9)
    shutil.copyfile(chain[1] / FILE, stranger / FILE)
    assert relation(stranger, digest(stranger), digest(chain[0])) is None
    handed_on = ancestors_for_child(stranger, "stranger", fingerprint(Base(stranger)).as_dict())
    assert [a["name"] for a in handed_on] == ["stranger"], "nor does it pass on to children"


@pytest.mark.parametrize("text", ["{", "[]", '{"fingerprint": {}}', '{"ancestors": [{}]}', '{"ancestors": []}'])
def test_a_broken_lineage_is_bad_input(chain: list[Path], tmp_path: Path, text: str) -> None:
    folder = Path(shutil.copytree(chain[1], tmp_path / "broken"))
    (folder / FILE).write_text(text)
    with pytest.raises(InputError, match=rf"{FILE}: broken"):
        relation(folder, digest(folder), digest(chain[0]))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": 9}, "format 9, this version reads 1"),
        ({"fingerprint": {"weights": 5, "tokenizer": "t", "config": "c"}}, "broken, expected JSON with fingerprint"),
        ({"ancestors": [{"fingerprint": {"weights": "w", "tokenizer": "t", "config": "c"}}]}, "broken, ancestor 1 is"),
        ({"ancestors": [{"name": "a", "fingerprint": {"weights": "w"}}]}, "broken, ancestor 1 is"),
        (
            {"ancestors": [{"name": 5, "fingerprint": dict.fromkeys(("weights", "tokenizer", "config"), "x")}]},
            "ancestor 1",
        ),
    ],
)
def test_a_lineage_with_a_field_of_another_type_is_bad_input(
    chain: list[Path], tmp_path: Path, change: dict, said: str
) -> None:
    record = json.loads((chain[1] / FILE).read_text())
    (tmp_path / FILE).write_text(json.dumps({**record, **change}))
    with pytest.raises(InputError, match=rf"{FILE}: .*{said}"):
        read_lineage(tmp_path)


def test_weights_go_onto_their_own_base_and_its_descendants(chain: list[Path], weights: AdaptedWeights) -> None:
    assert require_own_base(weights, Base(chain[0])) == fingerprint(Base(chain[0]))
    for folder in chain:
        own, related = require_descendant(weights, Base(folder))
        assert own.weights == digest(folder) and related == ("own" if folder == chain[0] else "recorded")


def test_weights_of_another_base_are_refused_by_name_and_digest(chain: list[Path], weights: AdaptedWeights) -> None:
    with pytest.raises(InputError) as caught:
        require_own_base(weights, Base(chain[1]))
    message = str(caught.value)
    assert message.startswith(f"{weights.folder}: belongs to base {str(chain[0])!r} (weights {digest(chain[0])[:12]})")
    assert message.endswith(f"but {chain[1]} has weights {digest(chain[1])[:12]}")


@pytest.mark.parametrize("part", ["tokenizer", "config"])
def test_the_same_weights_with_another_tokenizer_or_config_are_another_base(
    chain: list[Path], weights: AdaptedWeights, tmp_path: Path, part: str
) -> None:
    folder = Path(shutil.copytree(chain[0], tmp_path / "other"))
    file = folder / {"tokenizer": "tokenizer.json", "config": "config.json"}[part]
    content = json.loads(file.read_text())
    content.update({"version": "1.1"} if part == "tokenizer" else {"layer_norm_eps": 1e-6})
    file.write_text(json.dumps(content))
    with pytest.raises(InputError, match=rf"\({part} [0-9a-f:]{{12}}\), but .* has {part} [0-9a-f:]{{12}}$"):
        require_own_base(weights, Base(folder))


def test_an_unrelated_base_is_refused_unless_allowed(weights: AdaptedWeights, tmp_path: Path) -> None:
    stranger = Base(make_base(tmp_path / "stranger", seed=9))
    said = re.escape("does not descend from it by its lineage.json; `recyclable lineage declare` records")
    with pytest.raises(InputError, match=said):
        require_descendant(weights, stranger)
    assert require_descendant(weights, stranger, allow_unrelated=True) == (fingerprint(stranger), "unrelated")


@pytest.fixture
def elsewhere(chain: list[Path], tmp_path: Path) -> Path:
    """A child of the grandchild without any record of it, as if upgraded by other software."""
    folder = make_upgraded(chain[2], tmp_path / "elsewhere", seed=8)
    (folder / FILE).unlink()
    return folder


def test_a_declared_parent_opens_the_way_and_is_marked_as_a_claim(chain, weights, elsewhere) -> None:
    with pytest.raises(InputError, match="recyclable lineage declare"):
        require_descendant(weights, Base(elsewhere))
    declare(Base(elsewhere), Base(chain[2]), "m2")
    assert require_descendant(weights, Base(elsewhere)) == (fingerprint(Base(elsewhere)), "declared")
    ancestors = read_lineage(elsewhere)["ancestors"]
    assert [a["fingerprint"]["weights"] for a in ancestors] == [digest(chain[i]) for i in (2, 1, 0)]
    assert [a.get("declared", False) for a in ancestors] == [True, False, False]


def test_a_claim_stays_one_for_the_claimants_children(chain, elsewhere, tmp_path) -> None:
    declare(Base(elsewhere), Base(chain[2]), "m2")
    child = make_upgraded(elsewhere, tmp_path / "child", seed=11)
    assert relation(child, digest(child), digest(elsewhere)) == "recorded"
    assert relation(child, digest(child), digest(chain[0])) == "declared"


def test_what_cannot_be_a_child_is_not_declared(chain, elsewhere, tmp_path) -> None:
    wider = make_base(tmp_path / "wider", hidden=64)
    deeper = make_base(tmp_path / "deeper", layers=3)
    for folder, message in ((wider, r"is \(200, 64\), the parent's \(200, 32\)"), (deeper, "only in one")):
        with pytest.raises(InputError, match=message):
            declare(Base(folder), Base(chain[0]), "m0")
        assert not (folder / FILE).exists()
    with pytest.raises(InputError, match="has the same weights"):
        declare(Base(chain[0]), Base(chain[0]), "m0")
    with pytest.raises(InputError, match="says already that it comes from"):
        declare(Base(chain[1]), Base(chain[0]), "m0")


def test_the_command_line_declares_and_shows(chain, elsewhere, capsys) -> None:
    assert main(["lineage", "declare", str(elsewhere), "--parent", str(chain[2])]) == 0
    assert main(["lineage", "show", str(elsewhere), "--json"]) == 0
    lines = capsys.readouterr().out.splitlines()
    shown = json.loads(lines[-1])
    assert shown["ancestors"][0]["declared"] and shown["fingerprint"]["weights"] == digest(elsewhere)
    assert [line.split()[0] for line in lines[1:5]] == [digest(b)[:12] for b in (elsewhere, *chain[::-1])]
