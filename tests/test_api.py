"""The Python API: its documentation runs as it stands, and it gives what plain transformers and peft give."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from decoders import make_decoder
from peft import PeftModel
from processes import ROOT
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import BertForSequenceClassification
from worlds import make_adapter, make_base, make_corpus, make_outdated, make_task, make_upgraded

import recyclable
from recyclable import api
from recyclable.errors import InputError

BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "python.md").read_text(), re.DOTALL)
IDS = torch.tensor([[2, 10, 11, 12, 3], [2, 30, 31, 3, 0]])
BATCH = {"input_ids": IDS, "attention_mask": (IDS != 0).long(), "token_type_ids": torch.zeros_like(IDS)}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("api")
    make_base(root / "base")
    make_upgraded(root / "base", root / "upgraded")
    make_task(root / "task")
    make_corpus(root / "corpus")
    make_outdated(root / "base", root / "task", root / "tuned")
    make_adapter(root / "base", root / "task", root / "tuned-lora", "lora")
    make_base(root / "stranger", seed=9)
    make_decoder(root / "decoder", "llama")
    return root


def plain(world: Path, base: str) -> BertForSequenceClassification:
    """The same sum by hand: a base, the delta of `tuned`, its head."""
    model = BertForSequenceClassification.from_pretrained(world / base, num_labels=3)
    delta, head = (load_file(world / "tuned" / f"{name}.safetensors") for name in ("delta", "head"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            own = name.removeprefix("bert.")
            parameter.copy_(parameter + delta[own] if own in delta else head[own])
    return model.eval()


def test_every_block_of_the_documentation_runs_in_one_session(world: Path, tmp_path: Path) -> None:
    for folder in ("base", "upgraded", "task", "corpus", "tuned", "tuned-lora", "decoder"):
        (tmp_path / folder).symlink_to(world / folder)
    script = tmp_path / "session.py"
    script.write_text("\n".join(BLOCKS) + "\nassert verdict and record and rows[1]['test_accuracy'] >= 0\n")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [sys.executable, script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
    )
    assert len(BLOCKS) == 8 and done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "runs" / "exported" / "model.safetensors").is_file()


def test_importing_the_package_imports_nothing_slow() -> None:
    code = "import sys, recyclable; print(sorted({'torch', 'transformers', 'pydantic', 'numpy'} & set(sys.modules)))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True).stdout == b"[]\n"
    assert set(recyclable.__all__) <= set(dir(recyclable))


def test_a_carried_delta_is_the_sum_of_base_and_difference(world: Path) -> None:
    model, expected = recyclable.carry(world / "tuned", world / "upgraded"), plain(world, "upgraded")
    assert type(model) is BertForSequenceClassification and not model.training
    for name, parameter in expected.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter), name


def test_a_carried_adapter_is_what_peft_loads_onto_the_new_base(world: Path) -> None:
    model = recyclable.carry(world / "tuned-lora", world / "upgraded")
    base = BertForSequenceClassification.from_pretrained(world / "upgraded", num_labels=3)
    expected = PeftModel.from_pretrained(base, world / "tuned-lora").eval()
    assert isinstance(model, PeftModel)
    assert torch.allclose(model(**BATCH).logits, expected(**BATCH).logits, atol=1e-6)


def test_weights_are_carried_only_to_their_own_base_or_a_descendant(world: Path) -> None:
    with pytest.raises(InputError, match="does not descend from it"):
        recyclable.carry(world / "tuned", world / "stranger")


@pytest.mark.parametrize("beta", [0.0, 2.0])
def test_the_teachers_loss_is_the_papers_in_plain_pytorch(world: Path, beta: float) -> None:
    student, teacher = recyclable.carry(world / "tuned", world / "upgraded"), plain(world, "base")
    loss = recyclable.teacher_loss(student, world / "tuned", BATCH, temperature=3.0, beta=beta)
    said, told = (model(**BATCH, output_hidden_states=True) for model in (plain(world, "upgraded"), teacher))
    soft, log = F.softmax(told.logits.double() / 3, -1), F.log_softmax(said.logits.double() / 3, -1)
    expected = 9 * (soft * (soft.log() - log)).sum(-1).mean()
    states = [torch.stack([layer[:, 0] for layer in out.hidden_states[:-1]], 1) for out in (said, told)]
    expected = expected + beta * 0.5 * (states[0] - states[1]).square().mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    loss.backward()
    assert student.classifier.weight.grad.abs().sum() > 0


def test_weights_that_are_replaced_at_their_path_teach_anew(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_outdated(world / "base", world / "task", tmp_path / "other", seed=5)
    (tmp_path / "weights").symlink_to(world / "tuned")
    student = plain(world, "upgraded")
    opened = []
    carried = api.Carried.open
    monkeypatch.setattr(api.Carried, "open", lambda *names: opened.append(names) or carried(*names))
    api._teacher.cache_clear()
    losses = [recyclable.teacher_loss(student, tmp_path / "weights", BATCH, beta=beta).item() for beta in (0, 1, 0)]
    assert losses[0] == losses[2] != losses[1] and len(opened) == 1
    (tmp_path / "weights").unlink()
    shutil.copytree(world / "tuned", tmp_path / "weights")
    assert recyclable.teacher_loss(student, tmp_path / "weights", BATCH).item() == losses[0]
    shutil.rmtree(tmp_path / "weights")
    (tmp_path / "other").rename(tmp_path / "weights")
    replaced = recyclable.teacher_loss(student, tmp_path / "weights", BATCH).item()
    api._teacher.cache_clear()
    assert replaced == recyclable.teacher_loss(student, tmp_path / "weights", BATCH).item() != losses[0]


def test_a_student_with_other_classes_than_its_teacher_is_refused(world: Path) -> None:
    student = BertForSequenceClassification.from_pretrained(world / "upgraded", num_labels=2)
    with pytest.raises(InputError, match=r"^model: has 2 classes, expected the 3 of .*tuned$"):
        recyclable.teacher_loss(student, world / "tuned", BATCH)


def test_a_teacher_is_told_no_token_that_it_has_no_row_for(world: Path) -> None:
    student = BertForSequenceClassification.from_pretrained(world / "upgraded", num_labels=3)
    rows = student.config.vocab_size
    student.resize_token_embeddings(rows + 1)
    grown = {**BATCH, "input_ids": BATCH["input_ids"].clone()}
    grown["input_ids"][0, 1] = rows
    with pytest.raises(InputError, match=rf"^batch: has token {rows}, the teacher {rows} rows"):
        recyclable.teacher_loss(student, world / "tuned", grown)


def test_a_teacher_is_asked_for_nothing_that_does_not_compare(world: Path) -> None:
    student = BertForSequenceClassification.from_pretrained(world / "upgraded", num_labels=3)
    without = student(**BATCH)
    longer = {name: torch.cat([tensor, tensor]) for name, tensor in BATCH.items()}
    for keys, message in (
        ({"temperature": 0.0}, "temperature: is 0.0"),
        ({"beta": -1.0}, "beta: is -1.0"),
        ({"beta": 1.0, "outputs": without}, "outputs: has no hidden_states"),
        ({"outputs": student(**longer)}, r"model: says \[4, 3\] of the batch, the teacher \[2, 3\]"),
    ):
        with pytest.raises(InputError, match=f"^{message}"):
            recyclable.teacher_loss(student, world / "tuned", BATCH, **keys)


def test_a_teacher_is_on_its_own_base_even_where_another_took_its_place(world: Path, tmp_path: Path) -> None:
    student = BertForSequenceClassification.from_pretrained(world / "upgraded", num_labels=3)
    shutil.copytree(world / "base", tmp_path / "base")
    weights = make_outdated(tmp_path / "base", world / "task", tmp_path / "tuned")
    expected = recyclable.teacher_loss(student, weights, BATCH)
    api._teacher.cache_clear()
    (tmp_path / "base").rename(tmp_path / "first")
    make_upgraded(tmp_path / "first", tmp_path / "base")  # its lineage says where the old one is
    assert recyclable.teacher_loss(student, weights, BATCH) == expected
    api._teacher.cache_clear()
    (tmp_path / "first").rename(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="base"):
        recyclable.teacher_loss(student, weights, BATCH)
    assert recyclable.teacher_loss(student, weights, BATCH, old_base=tmp_path / "elsewhere") == expected


def test_a_verb_with_a_key_that_nothing_reads_says_which_are_read(world: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"unknown key 'alpha'; tuning full reads .*learning_rate"):
        recyclable.tune(
            base=str(world / "base"), task=str(world / "task"), out=str(tmp_path), max_steps=1, learning_rate=1, alpha=1
        )


def test_keys_that_nothing_reads_are_refused_where_there_is_no_run_config(world: Path, tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"^evaluate: unknown key 'on'; evaluate reads corpus, corpus_length, old_base, split, store$"
    ):
        recyclable.evaluate(world / "tuned", str(world / "base"), str(world / "task"), on="dev")
    with pytest.raises(InputError, match=r"^apply: unknown key 'alpha'; apply reads align, .*scale, seed"):
        recyclable.apply(world / "tuned", world / "upgraded", tmp_path / "out", alpha=1)
    with pytest.raises(InputError, match=r"^examples: is given, but nothing reads it without a task$"):
        recyclable.apply(world / "tuned", world / "upgraded", tmp_path / "out", examples=9)
    assert not (tmp_path / "out").exists()


def test_a_batch_that_does_not_come_out_whole_is_refused_before_anything_is_written(
    world: Path, tmp_path: Path
) -> None:
    (tmp_path / "ds.json").write_text(json.dumps({"train_micro_batch_size_per_gpu": 3}))
    run = {"base": str(world / "base"), "corpus": str(world / "corpus" / "train.txt"), "out": str(tmp_path / "out")}
    training = {"max_steps": 1, "train_batch_size": 4, "learning_rate": 1e-3, "max_length": 24}
    with pytest.raises(InputError, match=r"ds\.json: train_micro_batch_size_per_gpu 3 x 1 ranks does not divide"):
        recyclable.pretrain(deepspeed_config=str(tmp_path / "ds.json"), **run, **training)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("codec", "rank"), [("lowrank", 0), ("lowrank", -1), ("bf16", 4), (None, 4)])
def test_a_rank_that_is_none_or_that_no_codec_reads_is_refused(
    world: Path, tmp_path: Path, codec: str | None, rank: int
) -> None:
    store = recyclable.Store(tmp_path / "store")
    with pytest.raises(InputError, match=rf"^rank: found {rank} with codec {codec}, expected 1 or more and lowrank$"):
        store.add("mine", world / "tuned", codec=codec, rank=rank)
    assert not (tmp_path / "store").exists()
