"""One rank of test_zero_start.py: `zero_ranks.py runs.json`, a list of {case, world, ...arguments of the case}.

What each case found on each rank is written to <case name>-<rank>.json beside runs.json: "" or the failure.
"""

from __future__ import annotations

import json
import shutil
import sys
import traceback
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import deepspeed
import kept_states
import torch
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.utils import safe_get_full_fp32_param
from faults import loaded, pieces_of, record_of
from peft import LoraConfig, TaskType, get_peft_model
from processes import NOTHING_WHOLE
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertForSequenceClassification
from worlds import small_adapter

from recyclable import distributed
from recyclable.carrying.carried import Carried
from recyclable.config.settings import TrainSettings
from recyclable.errors import InputError, RunError
from recyclable.models.tasks import outdated_model, task_model
from recyclable.objectives.distillation import Distillation
from recyclable.objectives.labelled import LabelledTask
from recyclable.objectives.objective import Objective
from recyclable.objectives.teachers import OnlineTeacher
from recyclable.recipes.recycle import recycle
from recyclable.recipes.recycle_settings import read_recycle_settings
from recyclable.tasks.parts.task import load_task
from recyclable.training import best, rundir, zero
from recyclable.training.checkpoint import saving
from recyclable.training.checkpoint.saving import Saver
from recyclable.training.engine import engine_for, materialize
from recyclable.training.states import restore
from recyclable.tunings.full import Full
from recyclable.weights import digest, sources
from recyclable.weights.adapted import AdaptedWeights
from recyclable.weights.base import Base
from recyclable.weights.checkpoint_files import InMemory, SafetensorsFile
from recyclable.weights.delta import CODECS, Codec, write_delta
from recyclable.weights.sources import seed_of

SEED = 20


class World:
    """What the test has laid out: m0, its upgrade m1, a task, a delta and adapters of m0."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self.old, self.new = Base(self.folder / "m0"), Base(self.folder / "m1")
        self.task = load_task(str(self.folder / "task"))

    def start(self, kind: str) -> nn.Module:
        """A student, unread. kind: `full`, `lora`, `bottleneck` (fresh) or `outdated-` and one of these."""
        outdated, _, tuning = kind.rpartition("-")
        if outdated:
            return outdated_model(Carried(self.weights(tuning), self.old, self.new), self.task, SEED)
        settings = Full() if tuning == "full" else small_adapter(tuning)
        return settings.attach(task_model(self.new, self.task, SEED), "SEQ_CLS", SEED)

    def weights(self, tuning: str) -> AdaptedWeights:
        return AdaptedWeights(self.folder / f"outdated-{tuning}", verify=False)

    def teacher(self) -> OnlineTeacher:
        model = outdated_model(Carried(self.weights("full"), self.old, self.old), self.task, SEED)
        return OnlineTeacher(model, self.task.kind)


# ---- the oracle: whole models, whole state dicts -----------------------------------------------------------------


def expected(world: World, kind: str) -> dict[str, torch.Tensor]:
    """Values by the student's own names, in fp32, the way everybody loads and adds."""
    outdated, _, tuning = kind.rpartition("-")
    m0, m1 = (load_file(base.folder / "model.safetensors") for base in (world.old, world.new))
    model = BertForSequenceClassification.from_pretrained(world.new.folder, num_labels=3)
    drawn = ("bert.pooler.dense.weight", "classifier.weight")
    for name, parameter in model.named_parameters():  # the base has a masked-LM head and no pooler
        if name in drawn:
            drawn_from = torch.Generator().manual_seed(seed_of(SEED, name.removeprefix("bert.")))
            torch.nn.init.normal_(parameter, 0, 0.1, drawn_from)
        elif name.startswith(("bert.pooler", "classifier")):
            torch.nn.init.zeros_(parameter)
    if tuning == "full" and outdated:
        folder = world.weights("full").folder
        delta, head = load_file(folder / "delta.safetensors"), load_file(folder / "head.safetensors")
        names = {name: name.removeprefix("bert.") for name in model.state_dict()}
        model.load_state_dict({n: m1[n] + delta[s] if s in delta else head[s] for n, s in names.items()})
    if tuning == "lora":
        lora = LoraConfig(task_type=TaskType.SEQ_CLS, r=3, lora_alpha=16, modules_to_save=["classifier", "pooler"])
        torch.manual_seed(seed_of(SEED, "lora"))
        model = get_peft_model(model, lora)
    if tuning == "bottleneck":
        model = small_adapter("bottleneck").attach(model, "SEQ_CLS", SEED)
    values = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    if tuning != "full" and outdated:
        for name, tensor in load_file(world.weights(tuning).folder / "adapter_model.safetensors").items():
            saved_as = [n for n in values if n.replace(".modules_to_save.default", "").replace(".default", "") == name]
            own = name.removeprefix("base_model.model.")
            in_base = "LayerNorm" in own
            values[saved_as[0]] = m1[own] + (tensor - m0[own]) if in_base else tensor
    return values


# ---- cases -------------------------------------------------------------------------------------------------------


def partitions(
    world: World,
    kind: str,
    stage: int,
    precision: str,
    teacher: bool = False,
    engine: bool = False,
    held: bool = False,
    **config: Any,
) -> None:
    """What lies on this rank after `materialize`, and (`engine`) on all of them in an engine, is the oracle's.

    Args:
        held: the objective has all its values before.
    """
    objective, ds = objective_and_config(world, kind, stage, precision, teacher, config)
    if held:
        sources.fill(objective)
    wanted = {f"student.{name}": tensor for name, tensor in expected(world, kind).items()}
    if teacher:
        m0 = expected_teacher(world)
        wanted.update({f"teacher.model.{name}": tensor for name, tensor in m0.items()})
    materialize(objective, settings(), ds)
    dtype = getattr(torch, precision)
    trained = {n for n, p in objective.named_parameters() if p.requires_grad}
    found = dict(objective.named_parameters())
    assert found.keys() == wanted.keys(), found.keys() ^ wanted.keys()
    for name, parameter in found.items():
        want = wanted[name].to(dtype).view(-1)
        assert type(parameter) is nn.Parameter
        if stage == 3 and distributed.world_size() > 1:  # one rank alone has all of it whole
            size = -(-want.numel() // distributed.world_size())
            start = distributed.rank() * size
            assert parameter.numel() == 0 and parameter.ds_shape == wanted[name].shape
            assert parameter.ds_tensor.numel() == size
            got, want = parameter.ds_tensor, want[start : start + size]
            assert not got[len(want) :].any(), f"{name}: padding"
            got = got[: len(want)]
        else:
            got = parameter.detach().view(-1)
        assert got.dtype == dtype and torch.equal(got, want), name
    if not engine:
        return
    with engine_for(objective, settings(), ds, world.folder / "out") as started:
        for name, parameter in started.module.named_parameters():
            with deepspeed.zero.GatheredParameters([parameter], enabled=stage == 3):
                assert torch.equal(parameter.detach(), wanted[name].to(dtype)), f"{name} in the engine"
        assert {n for n, p in started.module.named_parameters() if p.requires_grad} == trained


def expected_teacher(world: World) -> dict[str, torch.Tensor]:
    folder, m0 = world.weights("full").folder, load_file(world.old.folder / "model.safetensors")
    delta, head = load_file(folder / "delta.safetensors"), load_file(folder / "head.safetensors")
    return {n: m0[n] + delta[n[5:]] for n in m0 if n[5:] in delta} | {
        f"bert.{n}" if n.startswith("pooler") else n: tensor for n, tensor in head.items()
    }


def extraction(world: World, kind: str, stage: int, precision: str, **config: Any) -> None:
    """After a step of training, the file that all ranks write holds the gathered fp32 values, and loads again."""
    objective, ds = objective_and_config(world, kind, stage, precision, False, config)
    out = world.folder / "-".join(
        map(str, ("extracted", distributed.world_size(), kind, stage, precision, *config.values()))
    )
    with engine_for(objective, settings(), ds, out) as engine:
        before = gathered(engine)
        train_once(engine)
        after = gathered(engine)
        assert any(not torch.equal(after[name], before[name]) for name in after)
        if distributed.is_main():
            out.mkdir(exist_ok=True)
        distributed.barrier()
        best.keep(engine.module.student, out / "best.safetensors")
        found = load_file(out / "best.safetensors")
        assert found.keys() == after.keys()
        for name, tensor in found.items():
            assert tensor.dtype == torch.float32 and torch.equal(tensor, after[name]), name
        assert [path.name for path in out.glob("*.safetensors*")] == ["best.safetensors"]
        distributed.barrier()
        other = {
            name: torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1))
            for name, tensor in found.items()
        }
        file = out / f"other-{distributed.rank()}.safetensors"
        save_file(other, file)
        zero.load_trainable(engine.module.student, SafetensorsFile(file))
        for name, parameter in engine.module.student.named_parameters():
            if parameter.requires_grad:
                with deepspeed.zero.GatheredParameters([parameter], enabled=stage == 3):
                    assert torch.equal(parameter.detach(), other[name].to(parameter.dtype)), name


def gathered(engine: deepspeed.DeepSpeedEngine) -> dict[str, torch.Tensor]:
    """DeepSpeed's own way to whole fp32 values."""
    trained = [(n, p) for n, p in engine.module.student.named_parameters() if p.requires_grad]
    whole = {}
    for name, parameter in trained:
        if isinstance(engine.optimizer, FP16_UnfusedOptimizer):
            full = kept_states.master(engine.optimizer, parameter)
        else:
            full = safe_get_full_fp32_param(parameter)
        whole[name] = (parameter if full is None else full).detach().clone().view(zero.full_shape(parameter))
    return whole


class Allocations(TorchDispatchMode):
    """The largest memory behind any tensor that comes out of an operation."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta":
                self.largest = max(self.largest, tensor.untyped_storage().nbytes())
        return result


def states(world: World, kind: str, stage: int, precision: str, of: str | None = None, **config: Any) -> None:
    """After two steps of training, files hold what the optimizer does; an engine that reads them goes on from there.

    Args:
        of: the case that wrote the files which are read at the start, on whatever ranks; None: none are.
    """
    objective, ds = objective_and_config(world, kind, stage, precision, False, config)
    with engine_for(objective, settings(), ds, world.folder / "out") as engine:
        steps = 0
        if of is not None:
            files = kept_states.read(engine, world.folder / of)
            restore(engine, files)
            steps = int(files.steps("student.classifier.bias" if kind == "full" else LORA_HEAD))
            assert steps >= 2
            kept_states.assert_held(engine, files, steps)
        for _ in range(2):
            train_once(engine)
        own = world.folder / f"states-{distributed.world_size()}-{name_of(kind, stage, precision, config)}"
        kept_states.write(engine, own)
        kept_states.assert_held(engine, kept_states.read(engine, own), steps + 2)


def name_of(kind: str, stage: int, precision: str, config: dict[str, Any]) -> str:
    return "-".join(filter(None, (kind, str(stage), precision, *(sorted(config)))))


LORA_HEAD = "student.base_model.model.classifier.modules_to_save.default.bias"


def train_once(engine: deepspeed.DeepSpeedEngine) -> None:
    batch = {
        "input_ids": torch.arange(5, 21).view(2, 8),
        "attention_mask": torch.ones(2, 8, dtype=torch.long),
        "labels": torch.tensor([0, 2]),
    }
    engine.backward(engine(batch)["task"])
    engine.step()


def saved_together(world: World) -> None:
    """All ranks' threads make one checkpoint; a rank whose disk is full is named on every rank, the older one stays."""
    ranks, rank = distributed.world_size(), distributed.rank()
    out = world.folder / f"saved-{ranks}"
    out.mkdir(exist_ok=True)
    with Saver(out, every=1) as saver:
        for step in (2, 4):
            record = distributed.broadcast_object(record_of(step, out, ranks) if rank == 0 else None)
            assert saver.due(step)
            saver.save(record, pieces_of(step, rank, ranks))
    assert loaded(out) == 4
    full = patch.object(saving, "write_pieces", side_effect=OSError(28, "No space left on device"))
    saver = Saver(out, every=1)
    record = distributed.broadcast_object(record_of(6, out, ranks) if rank == 0 else None)
    with full if rank == ranks - 1 else nullcontext():
        saver.save(record, pieces_of(6, rank, ranks))
        try:
            saver.wait()
            raise AssertionError("a full disk was not noticed")
        except RunError as error:
            wanted = f"checkpoint of step 6 could not be written: No space left on device (rank {ranks - 1} on "
            assert wanted in str(error), error
    distributed.barrier()
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["step-00000002", "step-00000004"]
    assert loaded(out) == 4


def shares(world: World, teacher: bool) -> None:
    """Each rank reads its share of base and delta, and nothing larger than the largest partition is ever in memory."""
    leaf, world_size = 256, distributed.world_size()
    kept = digest.LEAF, digest._ELEMENTS, sources.in_threads, SafetensorsFile.read_bytes
    reads: list[int] = []

    def counted(file: SafetensorsFile, name: str, start: int, stop: int) -> Any:
        reads.append(stop - start)
        return kept[3](file, name, start, stop)

    digest.LEAF, digest._ELEMENTS = leaf, leaf  # the tensors of a small model lie within one leaf of the real size
    try:
        world = World(str(world.folder))  # whose bases count leaves of this size
        objective, ds = objective_and_config(world, "outdated-full", 3, "float32", teacher, NOTHING_WHOLE)
        sizes = [parameter.numel() * 4 for parameter in objective.parameters()]
        sources.in_threads = lambda work, tasks: [work(task) for task in tasks]  # the spy sees this thread alone
        SafetensorsFile.read_bytes = counted
        with Allocations() as spy:
            materialize(objective, settings(), ds)
    finally:
        digest.LEAF, digest._ELEMENTS, sources.in_threads, SafetensorsFile.read_bytes = kept
    largest_partition = max(-(-size // 4 // world_size) * 4 for size in sizes)
    assert spy.largest <= largest_partition + leaf, (spy.largest, largest_partition, max(sizes))
    heads = 2 * sum(p.ds_numel * 4 for n, p in objective.named_parameters() if ".pooler." in n or ".classifier." in n)
    share = (2 * sum(sizes) - heads / 2) / world_size  # base and delta; the head comes from one file only
    assert sum(reads) <= share + 2 * len(sizes) * 2 * leaf, (sum(reads), share)
    assert sum(reads) >= share - 2 * len(sizes) * 2 * leaf
    assert world_size == 1 or sum(reads) < 0.8 * sum(sizes) * 2


def refused(world: World, stage: int, damaged: str, said: str, method: str = "both") -> None:
    """A run whose input was damaged after it was written ends with an InputError on every rank and leaves nothing."""
    names = {"m0": "old_base", "m1": "base", "outdated-full": "weights"}
    changed = {names[Path(damaged).parts[0]]: str(world.folder / f"damaged-{Path(damaged).parts[0]}")}
    out = world.folder / f"refused-{distributed.world_size()}-{stage}-{Path(damaged).parts[0]}-{method}"
    paths = {key: str(world.folder / name) for name, key in names.items()}
    content = {**settings().model_dump(), "out": out, "task": str(world.folder / "task"), "method": method}
    config = read_recycle_settings({**content, **paths, **changed}, "recycle.yaml")
    try:
        recycle(config, ds_config(stage, "float32", {}))
    except InputError as error:
        assert said in str(error), str(error)
    else:
        raise AssertionError("was not refused")
    distributed.barrier()
    assert not out.exists()


def recycled(world: World, weights: str, base: str, stage: int, **more: Any) -> None:
    """A run from outdated weights of m0 on another base: what it wrote is compared by the test."""
    out = world.folder / f"recycled-{distributed.world_size()}-{weights}"
    names = {"weights": weights, "old_base": "m0", "base": base, "task": "task"}
    paths = {key: str(world.folder / name) for key, name in names.items()}
    content = {**settings().model_dump(), "max_steps": 2, "eval_every": 2, "out": out, "method": "init", **paths}
    recycle(read_recycle_settings(content, "recycle.yaml"), ds_config(stage, "float32", more))


def written_together(world: World) -> None:
    """A delta that all ranks wrote is, byte for byte, the one that a process writes alone, in every codec."""
    draw, shapes = torch.Generator().manual_seed(3), {name: world.old.shape(name) for name in world.old.names}
    # far smaller than the base's: the difference is about the base's own value, and has lost their last bits
    tuned = InMemory({name: 1e-3 * torch.randn(shape, generator=draw) for name, shape in shapes.items()})
    kept, digest._ELEMENTS = digest._ELEMENTS, 100  # many pieces, so that every rank has some of each tensor
    files = {}
    for codec in CODECS:
        size = distributed.world_size()
        files[codec] = [world.folder / f"{codec}-{size}-{who}.safetensors" for who in ("all", distributed.rank())]
        write_delta(files[codec][0], tuned, world.old, Codec(codec, rank=2), distributed.Ranks())
        write_delta(files[codec][1], tuned, world.old, Codec(codec, rank=2))
    digest._ELEMENTS = kept
    for together, alone in files.values():
        assert together.read_bytes() == alone.read_bytes()
    assert sum("::index" in name for name in SafetensorsFile(files["exact"][0]).names) > 10


def not_shared(world: World) -> None:
    """An `out` that is another directory on each rank is refused on every rank, and nothing stays in it."""
    out = world.folder / f"host-{distributed.rank()}" / "out"
    rundir._PATIENCE_S = 0.5
    try:
        with rundir.claim(settings(), out, "manifest.json", resume=False):
            pass
    except InputError as error:
        assert "is not on a file system that all ranks share: not seen by rank 1 on " in str(error), str(error)
    else:
        raise AssertionError("was not refused")
    assert not out.exists()


def gone(world: World) -> None:
    """Of a run that fails before it has got anywhere nothing stays, whichever ranks fail; one that got on keeps all."""
    for failing, kept in (((0, 1), False), ((1,), False), ((0,), False), ((1,), True)):
        out = world.folder / "gone" / "out"
        with suppress(RuntimeError), rundir.claim(settings(), out, "manifest.json", resume=False):
            if distributed.is_main():
                (out / f"best-0000000{int(kept)}.safetensors").touch()
            distributed.barrier()
            if distributed.rank() in failing:
                raise RuntimeError
        distributed.barrier()
        assert (world.folder / "gone").exists() == kept, (failing, kept)
        distributed.barrier()


# ---- shared ------------------------------------------------------------------------------------------------------


def settings() -> TrainSettings:
    return TrainSettings(
        out=Path("unused"),
        max_steps=1,
        learning_rate=1e-2,
        train_batch_size=6,
        eval_every=1,
        save_every=0,
        max_length=24,
    )


def ds_config(stage: int, precision: str, more: dict[str, Any]) -> dict[str, Any]:
    content: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 6 // distributed.world_size(),
        "zero_optimization": {"stage": stage, **{key: value for key, value in more.items() if key != "data_types"}},
        "tensorboard": {"enabled": False},
        **{key: value for key, value in more.items() if key == "data_types"},
    }
    return content | ({"bf16": {"enabled": True}} if precision == "bfloat16" else {})


def objective_and_config(
    world: World, kind: str, stage: int, precision: str, teacher: bool, more: dict[str, Any]
) -> tuple[Objective, dict[str, Any]]:
    student = world.start(kind)
    objective: Objective = LabelledTask(student, world.task.kind)
    if teacher:
        objective = Distillation(student, world.task.kind, world.teacher(), alpha=0.5, beta=1.0, temperature=2.0)
    return objective, ds_config(stage, precision, more)


_ALL = (partitions, extraction, states, saved_together, shares, refused, recycled, written_together, not_shared, gone)
CASES: dict[str, Callable[..., None]] = {case.__name__: case for case in _ALL}


def main(file: str) -> int:
    distributed.init()
    torch.set_num_threads(1)
    for number, run in enumerate(json.loads(Path(file).read_text())):
        problem = ""
        try:
            CASES[run.pop("case")](World(run.pop("world")), **run)
        except Exception:
            problem = traceback.format_exc()
        Path(file).with_name(f"{number}-{distributed.rank()}.json").write_text(json.dumps(problem))
        distributed.barrier()
    shutil.rmtree(Path(file).parent / "out", ignore_errors=True)
    distributed.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
