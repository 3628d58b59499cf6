"""Every kind of adapter that peft has, against plain peft: equal on its base, an upgrade and other rows, or refused.

The table in docs/store.md is made of what these tests find: `WRITE_DOCS=1 pytest tests/adapters/test_every_kind.py`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import peft_kinds
import pytest
import torch
from peft import PeftType
from peft_kinds import BUILDABLE, ELSEWHERE, on_upgrade, reopened
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForSequenceClassification
from worlds import SPECIALS, WORDS, make_base, make_tokenizer, make_upgraded

from recyclable.api import Store, carry
from recyclable.errors import InputError
from recyclable.weights import lineage
from recyclable.weights.base import Base
from recyclable.weights.fingerprint import fingerprint

WITHIN: dict[str, float] = {"rtol": 0, "atol": 1e-5}  # logits in fp32
IDS = torch.randint(5, 200, (4, 12), generator=torch.Generator().manual_seed(1))
DOCUMENT = Path(__file__).parents[2] / "docs" / "store.md"
BEGIN, END = "<!-- kinds of adapters: made by tests/adapters/test_every_kind.py -->", "<!-- end of kinds -->"
BASES = ("own base", "upgrade", "other rows")
NOT_FOLDED = {"LILY", "PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CARTRIDGE"}
REFUSED = {
    "LORA, PiSSA": "changes the base's own weights",
    "FROD, unsaved": "is relative to a decomposition of the very base",
    "OSF": "is relative to a decomposition of the very base",
    "POLY": "wants the id of a task with every text",
    "PSOFT": "is relative to a decomposition of the very base",
    "SHADOW": "runs beside a decoder",
    "SUPERTUNING, unsaved": "is relative to a decomposition of the very base",
    "TRAINABLE_TOKENS": "needs classifier.bias, classifier.weight",
    "MULTITASK_PROMPT_TUNING": "wants the id of a task with every text",
    "ADAMSS": "is relative to a decomposition of the very base",
    "ADAPTION_PROMPT": "does not fit bert",
    "CPT": "CPTConfig only supports task_type = CAUSAL_LM",
    "XLORA": "expected an adapter that needs its own tensors only",
}
"""What `store add` says of those that it does not take."""


@dataclass
class World:
    """A base, its upgrade, the same base with its words in other rows, a store, and what was found so far."""

    root: Path
    base: Path
    upgraded: Path
    permuted: Path
    rows: torch.Tensor
    """Old row -> the row that the word has in `permuted`."""
    store: Store
    found: dict[str, dict[str, str]] = field(default_factory=dict)
    """Kind -> way -> result."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("kinds")
    base = make_base(root / "base", mlm_head=False)
    rows = torch.cat([torch.arange(5), 5 + torch.randperm(195, generator=torch.Generator().manual_seed(5))])
    permuted = _permuted(base, root / "permuted", rows)
    return World(root, base, make_upgraded(base, root / "up"), permuted, rows, Store(root / "store"))


def _permuted(base: Path, folder: Path, rows: torch.Tensor) -> Path:
    """The same model with its words in other rows, a child of `base`."""
    shutil.copytree(base, folder)
    tensors, words = load_file(folder / "model.safetensors"), [*SPECIALS, *WORDS]
    own = f"{peft_kinds.WORDS}.weight"
    tensors[own] = torch.empty_like(tensors[own]).index_copy(0, rows, tensors[own])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    make_tokenizer([words[i] for i in rows.argsort().tolist()][5:]).save_pretrained(folder)
    ancestors = lineage.ancestors_for_child(base, str(base), fingerprint(Base(base)).as_dict())
    record = {"format": 1, "fingerprint": fingerprint(Base(folder)).as_dict(), "ancestors": ancestors}
    (folder / lineage.FILE).write_text(json.dumps(record))
    return folder


def logits(model: nn.Module, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


@pytest.mark.parametrize("kind", BUILDABLE)
def test_a_kind_is_equal_to_plain_peft_or_refused_when_it_comes_in(world: World, kind: str) -> None:
    name = re.sub(r"\W+", "-", kind)
    adapter, taken = world.root / name, world.found.setdefault(kind, {})
    peft_kinds.make(kind, world.base, adapter)
    if kind in REFUSED:
        taken["refused"] = _refused(world, name, adapter, kind)
        return
    world.store.add(name, adapter, str(world.base))
    own = logits(reopened(world.base, adapter))
    shifted = on_upgrade(adapter, world.base, world.upgraded, world.root / f"{name}-shifted")
    wanted = {"own base": own, "upgrade": logits(reopened(world.upgraded, shifted)), "other rows": own}
    for where, base in zip(BASES, (world.base, world.upgraded, world.permuted), strict=True):
        ids = world.rows[IDS] if where == "other rows" else IDS
        out = world.root / f"{name} {where}"

        def exported(merged: bool, base: Path = base, out: Path = out) -> nn.Module:
            folder = out.with_name(f"{out.name} {merged}")
            world.store.export(name, str(base), folder, merged=merged)
            return AutoModelForSequenceClassification.from_pretrained(folder) if merged else reopened(base, folder)

        torch.testing.assert_close(logits(carry(name, base, store=world.root / "store"), ids), wanted[where], **WITHIN)
        torch.testing.assert_close(logits(exported(False), ids), wanted[where], **WITHIN)
        taken[where] = "equal"
        if kind.partition(",")[0] in NOT_FOLDED:
            with pytest.raises(InputError, match="cannot fold this kind of adapter"):
                exported(True)
            assert not out.with_name(f"{out.name} True").exists()
            taken["merged"] = "refused"
        else:
            torch.testing.assert_close(logits(exported(True), ids), wanted[where], **WITHIN)
            taken["merged"] = "equal"


@pytest.mark.parametrize("kind", ELSEWHERE)
def test_a_kind_that_cannot_be_used_here_is_refused_when_it_comes_in(world: World, kind: str) -> None:
    peft_kinds.make_by_hand(kind, world.root / kind)
    world.found[kind] = {"refused": _refused(world, kind, world.root / kind, kind)}


def _refused(world: World, name: str, adapter: Path, kind: str) -> str:
    with pytest.raises(InputError, match=re.escape(REFUSED[kind])) as caught:
        world.store.add(name, adapter, str(world.base))
    assert not (world.root / "store" / name).exists()
    return str(caught.value)


def test_no_kind_of_peft_is_left_out() -> None:
    tried = {kind.partition(",")[0] for kind in [*BUILDABLE, *ELSEWHERE]}
    assert tried == {kind.value for kind in PeftType} - {"BOTTLENECK"}, "the last one is recyclable's own"


def test_the_table_in_the_documentation_says_what_was_found(world: World) -> None:
    if world.found.keys() != BUILDABLE.keys() | ELSEWHERE.keys():
        pytest.skip("only all kinds together make the table")
    before, _, rest = DOCUMENT.read_text(encoding="utf-8").partition(BEGIN)
    table, _, after = rest.partition(END)
    made = f"\n{_table(world.found)}\n"
    if os.environ.get("WRITE_DOCS"):
        DOCUMENT.write_text(f"{before}{BEGIN}{made}{END}{after}", encoding="utf-8")
    else:
        assert table == made, f"run with WRITE_DOCS=1 to write {DOCUMENT.name}"


def _table(found: dict[str, dict[str, str]]) -> str:
    """A row for each kind and what becomes of it, with the settings that were tried."""
    rows: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for each, results in sorted(found.items()):
        kind, _, setting = each.partition(", ")
        cells = [results.get(where, "refused") for where in BASES]
        key = kind, (*cells, results.get("merged", REFUSED.get(each, "")))
        rows.setdefault(key, []).append(setting)
    ways = [f"{where}: evaluate, `--peft`" for where in BASES]
    head = ["kind", "settings beside the default", *ways, "`--merged`, or why refused"]
    lines = [head, ["---"] * len(head)]
    lines += [[kind, "; ".join(filter(None, settings)), *cells] for (kind, cells), settings in sorted(rows.items())]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
