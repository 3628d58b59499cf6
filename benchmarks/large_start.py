"""Starts of models that this machine could not hold: each rank's memory beside its share, one rank at a time.

    python benchmarks/large_start.py [--quick] [--json] [--scratch DIR]

Checkpoints of a 7B Llama's shape (and of a 70B's) in bf16 shards of 5 GB are sparse files: holes, which read as zeros
and take no disk, and a few values of their own in every tensor, where the ranges of ranks begin and end, so that what
each rank has can be checked. A rank of ZeRO-3 starts in a process of its own; PyTorch's fake process group stands for
the others. It goes the way of every verb: `carrying`, `models`, `training.zero.materialize`. Every rank hashes what it
reads; rank 0 then hashes alone all that the others would have, and compares the digests with lineage and manifest.

Memory is RssAnon of /proc/self/status, sampled every 2 ms, above the same process with everything imported: its own
pages, without the page cache. Rows, on 4 ranks in bf16:
- `full`: the base as a language model; `delta`: an outdated full difference on its upgrade; `lora`: an outdated LoRA on
  it; `teacher`: the upgrade as student and the base as frozen teacher in one module, a second 7B;
- `share_mb`: bytes of the rank's partitions; `peak_mb`: most at any time; `limit_mb`: 1.3 x share + 256 MB.
Of 70B: the shares by its config alone, starts of 1 and 2 layers on 4 ranks, and of all 80 layers on rank 0 of 64.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memory import MB, anonymous_bytes, peak

if TYPE_CHECKING:
    import torch
    from torch import nn

RANKS, MANY_RANKS = 4, 64
_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_key_value_heads": 32}
_70B = {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_key_value_heads": 8}
SHAPES = {
    "7b": {**_7B, "num_hidden_layers": 32, "vocab_size": 32000},  # Llama 2
    "70b": {**_70B, "num_hidden_layers": 80, "vocab_size": 128256},  # Llama 3
}
WHAT = ("full", "delta", "lora", "teacher")
_REAL = 64  # values of its own that a tensor has at each end of a rank's range
_WORDS = 1000  # that the tokenizer knows
_TASK: dict[str, Any] = {"name": "none", "problem": "generation", "labels": [], "labels_from": "task", "digest": ""}
_TIMEOUT_S = 900


def main() -> None:
    """Measure; print a table and, last, one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="4 layers instead of 32 and 80, ranks 0 and 3 alone")
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    parser.add_argument("--scratch", type=Path, help="where models are written (default: the temporary directory)")
    parser.add_argument("--start", nargs=4, metavar=("WORLD", "WHAT", "RANK", "RANKS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.start:
        world, what, rank, ranks = arguments.start
        print(json.dumps(start(Path(world), what, int(rank), int(ranks))))
        return
    result = measure(arguments.quick, arguments.scratch)
    from recyclable.report.compare import table

    for rows in (result["7b"], result["70b"]["starts"]):
        print(table([{k: round(v) if isinstance(v, float) else v for k, v in row.items()} for row in rows]), "\n")
    print("70B by its config:", json.dumps(result["70b"]["by_config"]))
    if arguments.json:
        print(json.dumps(result))


def measure(quick: bool, scratch: Path | None = None) -> dict[str, Any]:
    """`7b`: a row of each start of each rank; `70b`: `by_config`, and `starts` of some layers."""
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        world = make_world(Path(folder) / "7b", {**SHAPES["7b"], **({"num_hidden_layers": 4} if quick else {})}, RANKS)
        rows = [_started(world, what, rank, RANKS) for what in WHAT for rank in ((0, 3) if quick else range(RANKS))]
        large = []
        for layers, ranks in ((1, RANKS), (2, RANKS), (4 if quick else 80, MANY_RANKS)):
            large_world = Path(folder) / f"70b-{layers}"
            make_base(large_world / "old", {**SHAPES["70b"], "num_hidden_layers": layers}, ranks)
            large.append({"layers": layers, "ranks": ranks, **_started(large_world, "full", 0, ranks)})
    return {"7b": rows, "70b": {"by_config": by_config(SHAPES["70b"]), "starts": large}}


def by_config(shape: dict[str, Any]) -> dict[str, Any]:
    """Parameters of a shape and, for some numbers of ranks, each rank's share in bf16 (MB), from the config alone."""
    sizes = [p.numel() for p in _structure(shape).parameters()]
    shares = {ranks: sum(2 * -(-size // ranks) for size in sizes) / MB for ranks in (4, 8, 16, 32, MANY_RANKS)}
    return {"parameters": sum(sizes), "share_mb": shares, "largest_tensor_mb": 2 * max(sizes) / MB}


def _started(world: Path, what: str, rank: int, ranks: int) -> dict[str, Any]:
    """`start` in a process of its own."""
    command = [sys.executable, __file__, "--start", str(world), what, str(rank), str(ranks)]
    done = subprocess.run(command, check=True, timeout=_TIMEOUT_S, stdout=subprocess.PIPE, text=True)
    row = json.loads(done.stdout.splitlines()[-1])
    print(row, file=sys.stderr, flush=True)
    return row


# ---- what is started ---------------------------------------------------------------------------------------------


def make_world(folder: Path, shape: dict[str, Any], ranks: int) -> Path:
    """old/, new/ (its upgrade), and weights of old/: delta/ and lora/."""
    from recyclable.weights.base import Base
    from recyclable.weights.durable import write_json
    from recyclable.weights.fingerprint import fingerprint
    from recyclable.weights.lineage import FILE, ancestors_for_child

    for name in ("old", "new"):
        make_base(folder / name, shape, ranks)
    old, new = Base(folder / "old"), Base(folder / "new")
    prints = fingerprint(old).as_dict()
    ancestors = ancestors_for_child(old.folder, str(old.folder), prints)
    write_json(new.folder / FILE, {"format": 1, "fingerprint": fingerprint(new).as_dict(), "ancestors": ancestors})
    _write_delta(folder / "delta", old, prints, ranks)
    _write_lora(folder / "lora", old, prints)
    return folder


def make_base(folder: Path, shape: dict[str, Any], ranks: int) -> None:
    """A Llama in bf16, nearly all of it holes, and a tokenizer of a few words."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    from recyclable.weights.files import CheckpointWriter

    folder.mkdir(parents=True)
    model = _structure(shape)
    layout = {name: (torch.bfloat16, tuple(p.shape)) for name, p in model.named_parameters()}
    writer = CheckpointWriter(folder, layout)
    for name, (_, size) in layout.items():
        for place, values in real_values(f"{folder.name} {name}", torch.Size(size).numel(), ranks):
            writer.write(name, values, place)
    writer.close()
    model.config.dtype = torch.bfloat16
    model.config.save_pretrained(folder)
    words = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(_WORDS))]
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokens = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **tokens).save_pretrained(folder)


def real_values(name: str, size: int, ranks: int) -> Iterator[tuple[int, torch.Tensor]]:
    """(first element, bf16 values) at both ends of each rank's range of a tensor of so many elements."""
    import torch

    from recyclable.weights.sources import seed_of

    share = -(-size // ranks)
    for end in range(ranks):
        draw = torch.Generator().manual_seed(seed_of(end, name))
        first, last = end * share, min((end + 1) * share, size)
        for place in {first, max(first, last - _REAL)} if first < last else ():
            yield place, torch.randn(min(_REAL, last - place), generator=draw).bfloat16()


def _structure(shape: dict[str, Any]) -> Any:
    from transformers import LlamaConfig

    from recyclable.models.build import auto_class, structure

    return structure(
        LlamaConfig(**shape, max_position_embeddings=4096, tie_word_embeddings=False), auto_class("CausalLM")
    )


def _write_delta(folder: Path, old: Any, prints: dict[str, str], ranks: int) -> None:
    """A full difference in bf16, as sparse as the base, and no head."""
    import torch

    from recyclable.weights.files import SafetensorsWriter, write_tensors
    from recyclable.weights.manifest import DELTA, HEAD

    folder.mkdir()
    layout = {name: (torch.bfloat16, old.shape(name)) for name in old.names}
    writer = SafetensorsWriter(folder / DELTA, layout, {"codec": "bf16"})
    for name in old.names:
        for place, values in real_values(f"delta {name}", old.stored(name).numel, ranks):
            writer.write(name, values, place)
    writer.close()
    write_tensors(folder / HEAD, {})
    _write_manifest(folder, old, prints, kind="delta", tuning={"tuning": "full"})


def _write_lora(folder: Path, old: Any, prints: dict[str, str]) -> None:
    """A LoRA of rank 16 on all projections of attention and MLPs, random."""
    import torch
    from peft import LoraConfig, get_peft_model

    from recyclable.weights.files import write_tensors
    from recyclable.weights.manifest import ADAPTER

    targets = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
    config = LoraConfig(task_type="CAUSAL_LM", r=16, target_modules=targets)
    shape = {name: getattr(old.config, name) for name in SHAPES["7b"]}
    plan = get_peft_model(_structure(shape), config, low_cpu_mem_usage=True)
    draw = torch.Generator().manual_seed(1)
    names = {n.replace(".default", ""): p.shape for n, p in plan.named_parameters() if "lora_" in n}
    folder.mkdir()
    write_tensors(folder / ADAPTER, {name: 0.02 * torch.randn(size, generator=draw) for name, size in names.items()})
    config.save_pretrained(str(folder))
    _write_manifest(folder, old, prints, kind="adapter", tuning={"tuning": "peft"})


def _write_manifest(folder: Path, old: Any, prints: dict[str, str], **about: Any) -> None:
    from recyclable.weights.adapted import write_manifest
    from recyclable.weights.manifest import Manifest

    known = {"method": "tune", "metrics": {}, "history": [], "settings": {"seed": 20, "max_length": 128}}
    write_manifest(
        folder, Manifest(task=_TASK, base={"name": str(old.folder), "fingerprint": prints}, **known, **about)
    )


# ---- what a rank does --------------------------------------------------------------------------------------------


def start(world: Path, what: str, rank: int, ranks: int) -> dict[str, Any]:
    """Start one rank; what it took."""
    import deepspeed
    import torch
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    import recyclable.recipes.recycle  # noqa: F401  its imports belong to the baseline
    from recyclable.training import zero

    os.environ.update(RANK=str(rank), LOCAL_RANK="0", WORLD_SIZE=str(ranks))
    dist.init_process_group("fake", rank=rank, world_size=ranks, store=FakeStore())
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # as `distributed.init` has it
    deepspeed.init_distributed(verbose=False)
    torch.set_num_threads(1)
    ds_config = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    }
    baseline, begin = anonymous_bytes(), time.perf_counter()
    with peak() as most:
        module, verified = _unread(world, what)
        zero.materialize(module, ds_config)
        seconds, after = time.perf_counter() - begin, most[0]
        if rank == 0 and ranks == RANKS:  # of all that it did not read, too
            verified()
    share = sum(p.ds_tensor.numel() * p.ds_tensor.element_size() for p in module.parameters())
    _check(module, world, what, rank, ranks)
    return {
        "what": what,
        "rank": rank,
        "share_mb": share / MB,
        "peak_mb": (most[0] - baseline) / MB,
        "limit_mb": (1.3 * share) / MB + 256,
        "unverified_mb": (after - baseline) / MB,
        "baseline_mb": baseline / MB,
        "seconds": seconds,
    }


def _unread(world: Path, what: str) -> tuple[nn.Module, Any]:
    """The unread module, and what compares all digests."""
    from torch import nn

    from recyclable.carrying.carried import Carried
    from recyclable.data.examples import model_inputs
    from recyclable.models.language import language_model
    from recyclable.models.tasks import outdated_model
    from recyclable.objectives.token_distillation import TokenTeacher
    from recyclable.tasks.parts.task import task_of
    from recyclable.weights.base import Base
    from recyclable.weights.fingerprint import fingerprint

    if what in ("delta", "lora"):
        carried = Carried.open(world / what, world / "old", world / "new")
        return outdated_model(carried, task_of(_TASK), 20), carried.verify
    bases = [Base(world / name) for name in (("new", "old") if what == "teacher" else ("old",))]
    models = [language_model(base, "CausalLM", 20, None)[0] for base in bases]
    both = nn.ModuleList([models[0], *(TokenTeacher(model, None, model_inputs) for model in models[1:])])
    return both, lambda: [fingerprint(base) for base in bases]


def _check(module: nn.Module, world: Path, what: str, rank: int, ranks: int) -> None:
    """AssertionError unless the values that are no zeros are where they belong."""
    import torch

    def of(base: str, name: str, size: int) -> dict[int, torch.Tensor]:
        return dict(real_values(f"{base} {name}", size, ranks))

    seen = 0
    for name, parameter in module.named_parameters():
        if "lora_" in name:
            continue
        plain = name[name.index("model.layers") if "model.layers" in name else 0 :].replace("base_layer.", "")
        plain = plain[plain.index("lm_head") :] if "lm_head" in plain else plain
        plain = plain[plain.index("model.embed") :] if "model.embed" in plain else plain
        plain = plain[plain.rindex("model.norm") :] if "model.norm" in plain else plain
        base = "old" if what == "full" or name.startswith("1.") else "new"
        size, own = parameter.ds_numel, parameter.ds_tensor
        first = rank * own.numel()
        for place, values in of(base, plain, size).items():
            if first <= place < first + own.numel():
                got, want = own[place - first : place - first + len(values)], values.float()
                if what == "delta":
                    want = want + of("delta", plain.removeprefix("model."), size)[place].float()
                assert torch.equal(got.float(), want.bfloat16().float()), name
                seen += len(values)
    assert seen, "nothing was checked"


if __name__ == "__main__":
    main()
