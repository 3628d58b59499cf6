"""What saves memory changes no result: gradient checkpointing, activation offload, states and weights elsewhere."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from decoders import make_decoder
from processes import STAGE_3, finish, outcome, scalars, start
from safetensors.torch import load_file
from worlds import make_base, make_corpus, make_outdated, make_task, make_upgraded

from recyclable.errors import InputError
from recyclable.training.nvme import _missing, prepare

STEPS, INTERRUPTED = 4, 3
TOLERANCE, IN_BF16 = 1e-5, 1e-3  # relative; a sum of gradients that differs in fp32 may round another way in bf16
COMPUTE_AGAIN: dict[str, Any] = {"activation_checkpointing": {}}
INPUTS_ON_HOST: dict[str, Any] = {"activation_checkpointing": {"cpu_checkpointing": True}}
# What runs, and on what: dropout is on in the encoders.
WIDE = {"verb": "pretrain", "base": "wide", "corpus": "corpus"}
WHAT: dict[str, dict[str, Any]] = {
    "encoder": {"verb": "pretrain", "base": "base", "corpus": "corpus"},
    "decoder": {"verb": "pretrain", "base": "llama", "corpus": "corpus"},
    "encoder_lora": {"verb": "tune", "base": "base", "task": "task", "tuning": "lora"},
    "decoder_lora": {"verb": "tune", "base": "llama", "task": "task", "tuning": "lora"},
    "path": {
        **{"verb": "recycle", "base": "upgraded", "old_base": "base", "weights": "outdated", "task": "task"},
        **{"method": "interpolate", "interpolation_points": [0.3]},
    },
    "wide": WIDE,
    "wide_bf16": WIDE,
}


def compared(what: str) -> str:
    """What a saving is compared with: one rank that keeps nothing elsewhere computes below ZeRO-3: other rounding."""
    return "both" if "bf16" in what else "plain"


def savings(name: str, nvme: Path) -> dict[str, Any]:
    """The ds_config of one way to save memory, on top of a ZeRO stage."""
    on_nvme = {"device": "nvme", "nvme_path": str(nvme)}
    parameters = {"buffer_count": 4, "buffer_size": 1_000_000, "max_in_cpu": 0}
    on_cpu = {"device": "cpu"}
    more = {
        "plain": {},
        "again": COMPUTE_AGAIN,
        "host": INPUTS_ON_HOST,
        "optimizer": {"zero_optimization": {"offload_optimizer": on_cpu}},
        "both": {"zero_optimization": {"offload_optimizer": on_cpu, "offload_param": on_cpu}},
        "nvme": {"zero_optimization": {"offload_optimizer": on_nvme, "offload_param": {**on_nvme, **parameters}}},
        "nvme_parameters": {"zero_optimization": {"offload_param": {**on_nvme, **parameters}}},
    }
    return more[name]


# (what, stage, saving) that is compared with (what, stage, `compared`), and whether to the last bit.
PLAN = {
    1: [
        *[("encoder", 2, "again", True), ("encoder", 2, "host", True), ("encoder", 1, "optimizer", False)],
        *[("encoder", 3, "both", False), ("decoder", 0, "again", True), ("decoder", 2, "host", True)],
        *[("encoder_lora", 2, "again", True), ("decoder_lora", 0, "again", True), ("path", 2, "again", True)],
    ],
    2: [
        *[("encoder", 3, "host", True), ("encoder", 2, "optimizer", False), ("encoder", 3, "both", False)],
        *[("decoder", 3, "again", True), ("encoder_lora", 3, "again", True), ("path", 3, "again", True)],
    ],
}
ON_NVME = {
    1: [("wide", 3, "nvme", False), ("wide", 3, "nvme_parameters", False), ("wide_bf16", 3, "nvme", False)],
    2: [("wide", 3, "nvme", False)],
}
RESUMED = {1: [("encoder", 2, "host"), ("encoder", 3, "both")], 2: [("encoder", 3, "both")]}


class World:
    """Bases, a task and a corpus in a folder, and runs there."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.nvme = folder, folder / "nvme"
        self.nvme.mkdir()
        make_base(folder / "base")
        make_base(folder / "wide", hidden=512)  # so wide that its tensors are not too small for NVMe
        make_decoder(folder / "llama", "llama")
        make_upgraded(folder / "base", folder / "upgraded")
        make_task(folder / "task", train=30, dev=6, test=6)
        make_outdated(folder / "base", folder / "task", folder / "outdated")
        make_corpus(folder / "corpus", documents=40)

    def out(self, ranks: int, *name: Any) -> Path:
        return self.folder / "-".join(map(str, (ranks, *name)))

    def run(self, ranks: int, what: str, stage: int, saving: str, *, tag: str = "", **how: Any) -> dict[str, Any]:
        files = ("base", "old_base", "corpus", "task", "weights")
        own = {k: str(self.folder / v) if k in files else v for k, v in WHAT[what].items() if k != "verb"}
        config = {"out": self.out(ranks, what, stage, saving, *filter(None, [tag])), "max_steps": STEPS, **own}
        config |= {"train_batch_size": 4, "learning_rate": 2e-3, "max_length": 24, "eval_every": STEPS, "log_every": 1}
        config |= {"save_every": INTERRUPTED, "warmup_steps": 1}
        more = savings(saving, self.nvme)
        zero = {"stage": stage, **(STAGE_3 if stage == 3 else {}), **more.get("zero_optimization", {})}
        ds_config = {**more, "zero_optimization": zero, **({"bf16": {"enabled": True}} if "bf16" in what else {})}
        return {"verb": WHAT[what]["verb"], "config": config, "ds_config": ds_config, **how}

    def go(self, ranks: int, cases: list[tuple], resumed: list[tuple], name: str) -> None:
        """All of a plan in one launch: each case, what it is compared with, and runs broken off and gone on with."""
        plain = dict.fromkeys((what, stage, compared(what)) for what, stage, *_ in cases)
        runs = [self.run(ranks, *case[:3]) for case in [*plain, *cases]]
        for case in resumed:
            broken = self.run(ranks, *case, tag="resumed", raise_at=INTERRUPTED)
            runs += [broken, self.run(ranks, *case, tag="resumed", resume=True)]
        folder = self.folder / name
        finish(start(folder, runs, nproc=ranks if ranks > 1 else None), folder)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("savings"))


@pytest.fixture(scope="module")
def trained(world: World) -> World:
    for ranks in (1, 2):
        world.go(ranks, PLAN[ranks], RESUMED[ranks], f"launch-{ranks}")
    return world


@pytest.fixture(scope="module")
def trained_on_nvme(world: World) -> World:
    if (reason := _missing()) and not os.environ.get("CI"):
        pytest.skip(reason)
    assert not reason
    for ranks in (1, 2):
        resumed = [case[:3] for case in ON_NVME[ranks]]
        world.go(ranks, ON_NVME[ranks], resumed, f"launch-nvme-{ranks}")
    return world


def losses(world: World, *name: Any) -> list[float]:
    out = world.out(*name)
    assert outcome(out) == {}
    found = scalars(out, "train/loss")
    assert len(found) == STEPS and found[-1] != found[0]
    return found


def assert_as_plain(world: World, ranks: int, what: str, stage: int, saving: str, bits: bool) -> None:
    found, plain = (losses(world, ranks, what, stage, name) for name in (saving, compared(what)))
    assert found == (plain if bits else pytest.approx(plain, rel=IN_BF16 if "bf16" in what else TOLERANCE))


def assert_resumed(world: World, ranks: int, what: str, stage: int, saving: str) -> None:
    """The same tensors as the uninterrupted run's, to the last bit."""
    whole, resumed = (world.out(ranks, what, stage, saving, *tag) for tag in ((), ("resumed",)))
    assert outcome(resumed) == {}
    found, wanted = (load_file(out / "model.safetensors") for out in (resumed, whole))
    assert found.keys() == wanted.keys()
    assert [name for name, tensor in found.items() if not tensor.equal(wanted[name])] == []
    heldout = [json.loads((out / "lineage.json").read_text())["heldout"] for out in (resumed, whole)]
    assert heldout[0] == heldout[1]


@pytest.mark.parametrize("case", [(ranks, *case) for ranks, plan in PLAN.items() for case in plan], ids=str)
def test_losses_are_those_without_it(trained: World, case: tuple) -> None:
    assert_as_plain(trained, *case)


@pytest.mark.parametrize("case", [(ranks, *case) for ranks, plan in RESUMED.items() for case in plan], ids=str)
def test_a_resumed_run_ends_with_the_same_bits(trained: World, case: tuple) -> None:
    assert_resumed(trained, *case)


@pytest.mark.parametrize("case", [(ranks, *case) for ranks, plan in ON_NVME.items() for case in plan], ids=str)
def test_on_nvme_losses_are_the_same_and_a_resumed_run_ends_with_the_same_bits(trained_on_nvme, case) -> None:
    assert_as_plain(trained_on_nvme, *case)
    assert_resumed(trained_on_nvme, *case[:-1])


def test_nothing_stays_on_nvme(trained_on_nvme: World) -> None:
    assert list(trained_on_nvme.nvme.iterdir()) == []


@pytest.mark.parametrize("path", [None, "nowhere", "file"])
def test_an_nvme_path_that_cannot_be_written_to_is_refused_by_name(tmp_path: Path, path: str | None) -> None:
    (tmp_path / "file").touch()
    section = {"device": "nvme", **({"nvme_path": str(tmp_path / path)} if path else {})}
    with pytest.raises(InputError, match=r"^ds\.json: zero_optimization\.offload_param\.nvme_path ") as caught:
        prepare({"zero_optimization": {"stage": 3, "offload_param": section}}, "ds.json")
    assert "\n" not in str(caught.value)
