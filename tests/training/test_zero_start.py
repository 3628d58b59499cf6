"""Weights go straight into ZeRO's partitions and come straight out of them, on 1, 2 and 3 ranks, at every stage."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import full_value_kinds, make_peft, rearranged, taken_in
from processes import NOTHING_WHOLE, finish, start
from safetensors.torch import load_file
from worlds import WORDS, make_adapter, make_base, make_outdated, make_task, make_upgraded

from recyclable.weights.checkpoint_files import SafetensorsFile

RANKS = (1, 2, 3)
SOME_WHOLE = {"stage3_param_persistence_threshold": 500}  # of a model with tensors of 3 to 6400 elements
FULL = [
    {"case": "partitions", "kind": "outdated-full", "stage": stage, "precision": precision, "engine": True, **more}
    for stage, more in [(0, {}), (1, {}), (2, {}), (3, NOTHING_WHOLE), (3, SOME_WHOLE)]
    for precision in ("float32", "bfloat16")
]
KINDS = [
    {"case": "partitions", "kind": kind, "stage": 3, "precision": precision, **NOTHING_WHOLE}
    for kind in ("full", "lora", "bottleneck", "outdated-lora", "outdated-bottleneck")
    for precision in ("float32", "bfloat16")
] + [
    {"case": "partitions", "kind": kind, "stage": stage, "precision": "float32", "engine": True}
    for kind, stage in [("full", 2), ("outdated-bottleneck", 2), ("outdated-bottleneck", 3), ("lora", 3)]
]
HELD = [
    {"case": "partitions", "kind": "full", "stage": 3, "precision": precision, "engine": True, "held": True}
    for precision in ("float32", "bfloat16")
]
TEACHER = [
    {"case": "partitions", "kind": "outdated-full", "stage": s, "precision": p, "teacher": True, "engine": True}
    for s, p in [(2, "float32"), (3, "float32"), (3, "bfloat16")]
]
EXTRACTION = [
    {"case": "extraction", "kind": kind, "stage": stage, "precision": precision, **more}
    for kind, stage, precision, more in [
        *(("full", stage, precision, {}) for stage in (0, 1, 2, 3) for precision in ("float32", "bfloat16")),
        *(("full", 3, "float32", more) for more in (NOTHING_WHOLE, SOME_WHOLE)),
        *(("outdated-lora", stage, "bfloat16", {}) for stage in (2, 3)),
    ]
]
ON_HOST = {"offload_optimizer": {"device": "cpu"}}
LAYOUTS = {
    **{f"{stage}-{precision}": (stage, precision, {}) for stage in (0, 1, 2) for precision in ("float32", "bfloat16")},
    **{f"3-{precision}-{'-'.join(sorted(more))}": (3, precision, more)
       for precision in ("float32", "bfloat16") for more in (NOTHING_WHOLE, SOME_WHOLE)},
    "1-bfloat16-data_types": (1, "bfloat16", {"data_types": {"grad_accum_dtype": "fp32"}}),
    "2-float32-offload_optimizer": (2, "float32", ON_HOST),
    "3-bfloat16-offload_optimizer-offload_param": (3, "bfloat16", {**ON_HOST, "offload_param": {"device": "cpu"}}),
    "3-float32-sub_group_size": (3, "float32", {"sub_group_size": 1000}),
}  # fmt: skip


def states(ranks_before: int | None, shift: int, kind: str = "full") -> list[dict[str, Any]]:
    """A case per layout; with ranks that wrote before, each reads what another layout wrote on so many."""
    cases = []
    for place, (stage, precision, more) in enumerate(LAYOUTS.values()):
        written = list(LAYOUTS)[(place + shift) % len(LAYOUTS)]
        of = {} if ranks_before is None else {"of": f"states-{ranks_before}-{kind}-{written}"}
        cases.append({"case": "states", "kind": kind, "stage": stage, "precision": precision, **of, **more})
    return cases


LORA_STATES = [case for case in states(None, 0, "lora") if case["stage"] in (2, 3)][:3]
LORA_AGAIN = [{**case, "of": "states-2-lora-2-float32"} for case in LORA_STATES]
SHARES = [{"case": "shares", "teacher": teacher} for teacher in (False, True)]
REFUSED = [
    {"case": "refused", "stage": stage, "damaged": damaged, "said": said, "method": method}
    for stage in (2, 3)
    for damaged, said, method in [
        ("m0/model.safetensors", "belongs to base", "both"),
        ("m0/model.safetensors", "belongs to base", "init"),
        ("m1/model.safetensors", "does not descend from it", "both"),
        ("outdated-full/delta.safetensors", "was changed after it was written", "both"),
        ("outdated-full/head.safetensors", "was changed after it was written", "init"),
    ]
]
TOGETHER = [{"case": "written_together"}, {"case": "saved_together"}]
MOVED = {"case": "recycled", "weights": "outdated-words", "base": "m1-shuffled"}
CASES = {
    1: FULL[6:7] + KINDS[2:3] + EXTRACTION[0:8:2] + [{**MOVED, "stage": 0}] + states(3, 5) + LORA_AGAIN,
    2: FULL
    + KINDS
    + HELD
    + TEACHER
    + EXTRACTION
    + SHARES
    + REFUSED
    + TOGETHER
    + states(None, 0)
    + LORA_STATES
    + [{**MOVED, "stage": 3, **NOTHING_WHOLE}, {"case": "not_shared"}, {"case": "gone"}],
    3: FULL[6:10:3] + KINDS[:10:2] + TEACHER[2:] + EXTRACTION[4:8] + SHARES + TOGETHER + states(2, 3),
}


def name_of(case: dict[str, Any]) -> str:
    return "-".join(str(value) for value in case.values())


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("zero")
    make_base(root / "m0")
    make_upgraded(root / "m0", root / "m1")
    make_task(root / "task", train=30, dev=6, test=6)
    make_outdated(root / "m0", root / "task", root / "outdated-full")
    for kind in ("lora", "bottleneck"):
        make_adapter(root / "m0", root / "task", root / f"outdated-{kind}", kind)
    rearranged(root / "m1", root / "m1-shuffled", WORDS[::-1], root / "m0")
    words = make_peft(root / "m0", full_value_kinds()["words"], root / "words", scale=0.05)
    taken_in(words, root / "m0", root / "task", root / "outdated-words")
    for damaged in {case["damaged"] for case in REFUSED}:
        folder, file = Path(damaged).parts
        if not (root / f"damaged-{folder}").exists():
            shutil.copytree(root / folder, root / f"damaged-{folder}")
            flip_bit(root / f"damaged-{folder}" / file)
    return root


def flip_bit(file: Path) -> None:
    """In the middle of a tensor of the backbone, or of the head."""
    names = SafetensorsFile(file).names
    stored = SafetensorsFile(file).stored(next((n for n in names if "layer.1.output.dense.weight" in n), names[0]))
    content = bytearray(file.read_bytes())
    content[stored.offset + stored.nbytes // 2] ^= 1
    file.write_bytes(bytes(content))


@pytest.fixture(scope="module")
def found(world: Path) -> dict[int, list[list[str]]]:
    """Ranks -> for each case what went wrong on each rank."""
    problems = {}
    for ranks in (2, 3, 1):  # what 2 write 3 read, and what they write one
        folder = world / f"ranks-{ranks}"
        cases = [{**case, "world": str(world)} for case in CASES[ranks]]
        finish(start(folder, cases, nproc=ranks if ranks > 1 else None, script="zero_ranks.py"), folder)
        problems[ranks] = [
            [json.loads((folder / f"{number}-{rank}.json").read_text()) for rank in range(ranks)]
            for number in range(len(cases))
        ]
    return problems


@pytest.mark.parametrize(
    ("ranks", "number"),
    [
        pytest.param(ranks, number, id=f"{ranks}-{name_of(case)}")
        for ranks in RANKS
        for number, case in enumerate(CASES[ranks])
    ],
)
def test_every_rank_finds_what_the_oracle_computes(found, ranks: int, number: int) -> None:
    assert found[ranks][number] == [""] * ranks, next(filter(None, found[ranks][number]))


def test_the_file_is_the_same_however_many_ranks_write_it(world: Path, found) -> None:
    for ranks in RANKS[1:]:
        files = [world / f"extracted-{n}-full-3-float32" / "best.safetensors" for n in (1, ranks)]
        one, several = (load_file(file) for file in files)
        assert list(one) == list(several)
        assert max((one[name] - several[name]).abs().max() for name in one) < 1e-6


def test_an_adapter_whose_words_moved_is_recycled_alike_however_many_ranks_hold_it(world: Path, found) -> None:
    """Its embedding and all biases are full values; the upgrade has the words in another order."""
    one, several = (load_file(world / f"recycled-{n}-outdated-words" / "adapter_model.safetensors") for n in RANKS[:2])
    assert one.keys() == several.keys()
    assert max((one[name] - several[name]).abs().max() for name in one) < 1e-5
    old, name = load_file(world / "words" / "adapter_model.safetensors"), "bert.embeddings.word_embeddings.weight"
    rows, m0, m1 = (load_file(world / base / "model.safetensors")[name] for base in ("m1-shuffled", "m0", "m1"))
    learned = one[f"base_model.model.{name}"] - rows  # of two steps and of the old tuning, by token
    tuned = old[f"base_model.model.{name}"] - m0
    assert torch.equal(rows[5:], m1[5:].flip(0))
    assert (learned[5:] - tuned[5:].flip(0)).abs().mean() < 0.2 * (learned[5:] - tuned[5:]).abs().mean()
