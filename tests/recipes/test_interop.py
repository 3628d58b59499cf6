"""What goes out opens elsewhere: plain transformers, peft and TensorBoard read it in a process without recyclable."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from worlds import make_base, make_corpus, make_roberta, make_task, write_config

from recyclable.carrying.carried import Carried
from recyclable.cli import main
from recyclable.data.blocks import MaskedBlocks
from recyclable.data.corpus import load_corpus, pack
from recyclable.data.examples import LabelledTexts
from recyclable.models.tasks import outdated_model
from recyclable.objectives.labelled import LabelledTask
from recyclable.tasks.parts.task import load_task
from recyclable.training.evaluation import _HELD_OUT_EPOCH
from recyclable.weights.adapted import AdaptedWeights
from recyclable.weights.base import Base
from recyclable.weights.lineage import read_lineage
from recyclable.weights.manifest import read_manifest
from recyclable.weights.sources import fill
from recyclable.weights.vocabulary import load_tokenizer

COMMON = {"max_length": 24, "train_batch_size": 8, "seed": 3, "eval_every": 6, "log_every": 4, "save_every": 0}
UNTRAINED = {name: COMMON[name] for name in ("max_length", "seed")}
TUNE = {**COMMON, "max_steps": 12, "learning_rate": 2e-2}
FAMILIES = ("bert", "roberta")


def run(verb: str, out: Path, **settings: Any) -> Path:
    """`recyclable verb` with these settings; its result's directory."""
    file = write_config(out.with_name(f"{out.name}.yaml"), {**settings, "out": out})
    assert main([verb, str(file)]) == 0
    return out


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For both families: a base, its upgrade, LoRA weights tuned on the base and recycled for the upgrade."""
    root = tmp_path_factory.mktemp("interop")
    task, corpus = make_task(root / "task", train=60), make_corpus(root / "corpus", documents=40)
    make_corpus(root / "heldout", documents=6, seed=8)
    for family in FAMILIES:
        here = root / family
        base = make_roberta(here / "m0") if family == "roberta" else make_base(here / "m0", mlm_head=False)
        new = run(
            "pretrain",
            here / "m1",
            base=base,
            corpus={"train": str(corpus), "heldout": str(root / "heldout" / "train.txt")},
            **{**COMMON, "max_steps": 12, "learning_rate": 3e-3, "mlm_head_steps": 4},
        )
        tuned = run("tune", here / "tuned", base=base, task=task, tuning="lora", lora_r=4, **TUNE)
        shared = {"base": new, "old_base": base, "task": task, **TUNE}
        run("recycle", here / "recycled", weights=tuned, method="both", **shared)
        for name, folder, weights in (("tuned", base, here / "tuned"), ("recycled", new, here / "recycled")):
            _write_expected_logits(here / f"{name}.logits.safetensors", folder, weights, task)
        _write_heldout_batch(here / "heldout.safetensors", root / "heldout" / "train.txt", new)
    return root


def _write_expected_logits(file: Path, base: Path, weights: Path, task_folder: Path) -> None:
    """What recyclable's own model says of the test split, with the inputs it was given."""
    task, opened = load_task(task_folder), Base(base)
    carried = Carried(AdaptedWeights(weights), opened, opened)
    model = fill(LabelledTask(outdated_model(carried, task, COMMON["seed"]), task.kind)).eval()
    examples = LabelledTexts(task.splits["test"], load_tokenizer(base), COMMON["max_length"])
    batch = examples.batch([(0, i) for i in range(len(examples))])
    with torch.no_grad():
        logits = model(batch, predict=True)
    save_file({**{name: t.contiguous() for name, t in batch.items()}, "logits": logits}, file)


def _write_heldout_batch(file: Path, text: Path, base: Path) -> None:
    """The whole held-out text as it was masked for evaluation, with -100 as the label where nothing was masked."""
    tokenizer = load_tokenizer(base)
    blocks = pack(load_corpus(str(text), split="heldout"), tokenizer, COMMON["max_length"])
    masked = MaskedBlocks(blocks, tokenizer, 0.15, COMMON["seed"], range(len(blocks)))
    batch = masked.batch([(_HELD_OUT_EPOCH, i) for i in range(len(blocks))])
    labels = torch.full_like(batch["input_ids"], -100).flatten()
    labels[batch["positions"]] = batch["targets"]
    save_file({"input_ids": batch["input_ids"], "labels": labels.view_as(batch["input_ids"])}, file)


READER = """
import json, sys
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer, pipeline

torch.set_num_threads(1)
found = {}
for family in sys.argv[2:]:
    here, seen = Path(sys.argv[1]) / family, {}
    model, info = AutoModelForMaskedLM.from_pretrained(here / "m1", output_loading_info=True)
    seen["missing"] = sorted(info["missing_keys"]) + sorted(map(str, info["mismatched_keys"]))
    seen["unexpected"] = sorted(info["unexpected_keys"])
    seen["embedding"] = model.get_input_embeddings().weight.sum().item()
    batch = load_file(here / "heldout.safetensors")
    with torch.no_grad():
        seen["loss"] = model.eval()(**batch).loss.item()
    fill = pipeline("fill-mask", model=str(here / "m1"))
    mask = fill.tokenizer.mask_token
    seen["filled"] = [guess["token_str"] for guess in fill(f"w1 w4 {mask} w40 w122")]
    for name, base in (("tuned", "m0"), ("recycled", "m1")):
        data = load_file(here / f"{name}.logits.safetensors")
        expected, labels = data.pop("logits"), data.pop("labels")
        plain = AutoModelForSequenceClassification.from_pretrained(here / base, num_labels=expected.shape[1])
        peft = PeftModel.from_pretrained(plain, here / name).eval()
        with torch.no_grad():
            logits = peft(**data).logits
        seen[name] = {
            "difference": (logits - expected).abs().max().item(),
            "spread": expected.std().item(),
            "accuracy": (logits.argmax(-1) == labels).double().mean().item(),
        }
        merged = peft.merge_and_unload()
        with torch.no_grad():
            seen[name]["merged"] = (merged(**data).logits - expected).abs().max().item()
    for name in ("m1", "tuned", "recycled"):
        events = EventAccumulator(str(here / name / "tensorboard")).Reload()
        scalars = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
        seen[f"events of {name}"] = scalars
    found[family] = seen
assert not any(name.partition(".")[0] == "recyclable" for name in sys.modules)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def seen(root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a process without recyclable finds in the results."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "reader.py").write_text(READER)
    ended = subprocess.run(
        [sys.executable, "reader.py", str(root), *FAMILIES],
        cwd=elsewhere,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    return json.loads(ended.stdout.splitlines()[-1])


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_opens_an_upgraded_base_and_finds_every_tensor(seen, root: Path, family: str) -> None:
    found = seen[family]
    assert found["missing"] == []
    pooler = ["bert.pooler.dense.bias", "bert.pooler.dense.weight"]
    assert found["unexpected"] == (pooler if family == "bert" else [])
    assert found["embedding"] == pytest.approx(Base(root / family / "m1")["embeddings.word_embeddings.weight"].sum())


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_measures_the_held_out_loss_that_was_recorded(seen, root: Path, family: str) -> None:
    recorded = read_lineage(root / family / "m1")["heldout"]
    assert seen[family]["loss"] == pytest.approx(recorded["after"]["loss"], rel=1e-4)
    assert recorded["after"]["loss"] < recorded["before"]["loss"]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_fill_mask_pipeline_fills_masks_with_words(seen, family: str) -> None:
    assert len(seen[family]["filled"]) == 5
    assert all(word.startswith("w") or word.startswith("[") for word in seen[family]["filled"])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["tuned", "recycled"])
def test_peft_gives_the_logits_that_recyclable_gives(seen, root: Path, family: str, name: str) -> None:
    found, manifest = seen[family][name], read_manifest(root / family / name)
    assert found["spread"] > 0.05
    assert found["difference"] < 1e-5 and found["merged"] < 1e-4
    assert found["accuracy"] == pytest.approx(manifest.metrics["test"]["accuracy"])


@pytest.mark.parametrize("family", FAMILIES)
def test_tensorboard_shows_named_scalars_at_their_steps(seen, root: Path, family: str) -> None:
    pretrained, tuned, recycled = (seen[family][f"events of {name}"] for name in ("m1", "tuned", "recycled"))
    assert {"train/loss", "train/mlm", "train/learning_rate", "eval/loss", "eval/perplexity"} <= pretrained.keys()
    assert {"train/loss", "train/task", "eval/accuracy", "eval/f1_macro"} <= tuned.keys()
    assert {"train/task", "train/kd", "train/patient"} <= recycled.keys()
    for scalars in (pretrained, tuned, recycled):
        assert all(value > 0 for _, value in scalars["perf/examples_per_s"])
    assert [step for step, _ in tuned["train/loss"]] == [4, 8, 12]
    history = read_manifest(root / family / "tuned").history
    expected = [(row["step"], pytest.approx(row["accuracy"])) for row in history]
    assert [tuple(point) for point in tuned["eval/accuracy"]] == expected
    assert [step for step, _ in expected] == [0, 6, 12]


def test_the_pooler_of_a_base_passes_through_an_upgrade(root: Path) -> None:
    before, after = (load_file(root / "bert" / name / "model.safetensors") for name in ("m0", "m1"))
    for part in ("weight", "bias"):
        assert torch.equal(after[f"bert.pooler.dense.{part}"], before[f"pooler.dense.{part}"])
    assert not torch.equal(
        after["bert.encoder.layer.0.output.dense.weight"], before["encoder.layer.0.output.dense.weight"]
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("tuning", "size"), [("full", {}), ("bottleneck", {"bottleneck_size": 4})])
def test_tuning_and_recycling_run_end_to_end(
    root: Path, tmp_path: Path, family: str, tuning: str, size: dict[str, int]
) -> None:
    here, task = root / family, root / "task"
    tuned = run("tune", tmp_path / "tuned", base=here / "m0", task=task, tuning=tuning, **size, **TUNE)
    shared = {"base": here / "m1", "old_base": here / "m0", "weights": tuned, "task": task}
    recycled = run("recycle", tmp_path / "recycled", method="both", **shared, **TUNE)
    applied = run("recycle", tmp_path / "applied", method="apply", **shared, **UNTRAINED)
    for folder in (recycled, applied):
        manifest = AdaptedWeights(folder).manifest
        assert manifest.recycled_from["base"] == read_manifest(tuned).base
        assert manifest.base["fingerprint"] == read_lineage(here / "m1")["fingerprint"]
        assert 0 <= manifest.metrics["test"]["accuracy"] <= 1
    first = read_manifest(recycled).history[0]
    assert first["accuracy"] == pytest.approx(read_manifest(applied).metrics["dev"]["accuracy"])
