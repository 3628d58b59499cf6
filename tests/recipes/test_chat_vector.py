"""A whole tuned decoder without a head for a task goes onto an upgraded base: stored, applied, scored, probed."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from answers import log_likelihood, rows_of
from decoders import END, make_decoder
from plain import COMMON
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer
from worlds import WORDS, make_upgraded

from recyclable import api, carry, teacher_loss
from recyclable.cli import main
from recyclable.tasks.parts.fewshot import limit
from recyclable.tasks.parts.task import load_task
from recyclable.weights.manifest import read_manifest
from recyclable.weights.store import VARIABLE, Store

TIED = {"gpt2": True, "llama": False, "t5": True}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("chat")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, str(root / "store"))
        for family in TIED:
            base = make_decoder(root / family / "base", family)
            make_upgraded(base, root / family / "new", scale=0.05)
            shutil.copytree(base, root / family / "tuned")
            file, noise = root / family / "tuned" / "model.safetensors", torch.Generator().manual_seed(5)
            tensors = {n: t + 0.1 * torch.randn(t.shape, generator=noise) for n, t in sorted(load_file(file).items())}
            save_file(tensors, file, metadata={"format": "pt"})
        make_tasks(root)
        yield root


def make_tasks(root: Path) -> None:
    """Answers are what the tuned decoder itself would say, so that it is worth something."""
    for name in ("generation", "choice"):
        (root / name).mkdir()
    model = AutoModelForCausalLM.from_pretrained(root / "llama" / "tuned")
    tokenizer = AutoTokenizer.from_pretrained(root / "llama" / "tuned")
    for split, begin in (("train", 0), ("dev", 20)):
        said, chosen = [], []
        for i in range(begin, begin + 20):
            prompt = f"{WORDS[3 * i]} {WORDS[2 * i + 1]}"
            ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
            made = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=END)[0, ids.shape[1] :]
            answer = " " + tokenizer.decode(made, skip_special_tokens=True)
            said.append({"prompt": prompt, "response": answer})
            others = ["".join(f" {WORDS[(7 * i + 11 * k + n) % 195]}" for n in range(4)) for k in range(2)]
            chosen.append({"prompt": prompt, "choices": [*others[: i % 3], answer, *others[i % 3 :]], "answer": i % 3})
        for name, rows in (("generation", said), ("choice", chosen)):
            (root / name / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def run(capsys: pytest.CaptureFixture, *argv: object) -> dict[str, Any]:
    capsys.readouterr()
    status = main([*map(str, argv), "--json"])
    said = capsys.readouterr()
    assert status == 0, said.err
    return json.loads(said.out.splitlines()[-1])


def added(capsys: pytest.CaptureFixture, root: Path, family: str) -> Path:
    store = Store(root / "store")
    if family not in store.names():
        run(
            capsys,
            "store",
            "add",
            "--tuned",
            root / family / "tuned",
            "--base",
            root / family / "base",
            "--name",
            family,
        )
    return store.path(family)


def expected(root: Path, family: str) -> dict[str, torch.Tensor]:
    old, new, tuned = (load_file(root / family / name / "model.safetensors") for name in ("base", "new", "tuned"))
    return {name: new[name] + (tuned[name] - old[name]) for name in new}


@pytest.mark.parametrize("family", TIED)
def test_the_whole_difference_goes_onto_the_upgraded_base(
    root: Path, family: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    manifest = read_manifest(added(capsys, root, family))
    assert (manifest.task["problem"], manifest.task["labels"]) == ("generation", [])
    assert load_file(root / "store" / family / "head.safetensors") == {}
    run(capsys, "apply", "--weights", family, "--base", root / family / "new", "--out", tmp_path / "applied")
    argv = ("store", "export", family, "--merged", "--base", root / family / "new", "--out", tmp_path / "exported")
    run(capsys, *argv)
    auto = AutoModelForSeq2SeqLM if family == "t5" else AutoModelForCausalLM
    for out in ("applied", "exported"):
        found, missing = auto.from_pretrained(tmp_path / out, output_loading_info=True)
        assert not missing["missing_keys"]
        values = dict(found.named_parameters())
        for name, value in expected(root, family).items():
            assert torch.allclose(values[name], value, atol=1e-6), name
    carried = carry(family, root / family / "new")
    assert all(torch.equal(values[name], p) for name, p in carried.named_parameters())


def test_it_is_scored_and_probed_by_how_likely_it_finds_responses(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    added(capsys, root, "llama")
    rows = rows_of(root / "generation" / "dev.jsonl")
    run(capsys, "apply", "--weights", "llama", "--base", root / "llama" / "new", "--out", tmp_path / "applied")
    old, new, alone = (
        log_likelihood(AutoModelForCausalLM.from_pretrained(at), AutoTokenizer.from_pretrained(at), rows)
        for at in (root / "llama/tuned", tmp_path / "applied", root / "llama/new")
    )
    argv = ("--weights", "llama", "--base", root / "llama" / "new", "--task", root / "generation")
    (scored,) = run(capsys, "evaluate", *argv, "--split", "dev")["runs"]
    assert scored["dev_log_likelihood"] == pytest.approx(new, abs=1e-5)
    assert {"dev_exact_match", "dev_f1", "dev_rouge_l", "dev_perplexity"} <= scored.keys()

    found = run(capsys, "probe", *argv, "--points", 3, "--out", tmp_path / "probe")
    told = found["evidence"]["compatibility"]
    assert told["metric"] == "log_likelihood"
    for name, wanted in {"old": old, "new": new, "base": alone, "guessing": -math.log(208)}.items():
        assert told[name]["log_likelihood"] == pytest.approx(wanted, abs=1e-5), name
    left = (new - max(alone, -math.log(208))) / (old - max(alone, -math.log(208)))
    assert found["verdict"] == ("apply" if left >= 0.95 else "both" if left >= 0.2 else "distill")
    assert found["fitted_on"] == "classification"
    assert found["evidence"]["connectivity"]["metric"][0] == pytest.approx(old, abs=1e-5)
    page = (tmp_path / "probe" / "report.html").read_text()
    assert "fitted on classification only" in page and "the new base without them" in page
    assert main(["probe", *map(str, argv), "--points", "3"]) == 0
    assert "fitted on classification only" in capsys.readouterr().out


def test_choices_are_probed_over_the_new_base_alone(root: Path, capsys: pytest.CaptureFixture) -> None:
    added(capsys, root, "llama")
    argv = ("--weights", "llama", "--base", root / "llama" / "new", "--task", root / "choice", "--points", 2)
    told = run(capsys, "probe", *argv)["evidence"]["compatibility"]
    assert told["guessing"] == pytest.approx({"loss": math.log(3), "accuracy": 1 / 3, "accuracy_norm": 1 / 3})
    assert told["old"]["accuracy"] > max(told["base"]["accuracy"], 1 / 3)


def test_entries_are_ranked_by_what_they_make_of_responses(root: Path, capsys: pytest.CaptureFixture) -> None:
    added(capsys, root, "llama")
    added(capsys, root, "gpt2")
    argv = ("--task", root / "generation", "--base", root / "llama" / "new", "--examples", 10)
    rows = run(capsys, "store", "similar", *argv)["entries"]
    assert [row["name"] for row in rows if "left_out" not in row] == ["llama", "(the base alone)"]
    assert rows[0]["log_likelihood"] > rows[1]["log_likelihood"]
    assert "gpt2" in [row["name"] for row in rows if "left_out" in row]


def test_a_teachers_loss_is_over_the_tokens_that_labels_name(root: Path, capsys: pytest.CaptureFixture) -> None:
    added(capsys, root, "llama")
    student = AutoModelForCausalLM.from_pretrained(root / "llama" / "new").eval()
    teacher = AutoModelForCausalLM.from_pretrained(root / "llama" / "tuned").eval()
    ids = torch.tensor([[5, 6, 7, 8, 9, END], [10, 11, 12, END, END, END]])
    batch = {"input_ids": ids, "attention_mask": torch.tensor([[1] * 6, [1, 1, 1, 1, 0, 0]])}
    labels = torch.tensor([[-100, -100, -100, 8, 9, END], [-100, 11, 12, END, -100, -100]])
    for given in ({**batch, "labels": labels}, batch):
        told = given.get("labels", ids.masked_fill(batch["attention_mask"] == 0, -100))[:, 1:] != -100
        with torch.no_grad():
            theirs = teacher(**batch, output_hidden_states=True)
        ours = student(**batch, output_hidden_states=True)
        p, q = ((out.logits[:, :-1][told] / 2.0).softmax(-1) for out in (theirs, ours))
        kl = (p * (p / q).log()).sum(-1).mean()
        pairs = list(zip(ours.hidden_states[:-1], theirs.hidden_states[:-1], strict=True))
        patient = sum(
            0.5 * sum(F.mse_loss(a[row, :-1][told[row]], b[row, :-1][told[row]]) for a, b in pairs) / len(pairs)
            for row in range(2)
        )
        wanted = 4.0 * kl + 3.0 * patient / 2
        found = teacher_loss(student, "llama", given, temperature=2.0, beta=3.0)
        assert found.item() == pytest.approx(wanted.item(), rel=1e-5)
        known = teacher_loss(student, "llama", given, outputs=ours, temperature=2.0, beta=3.0)
        assert known.item() == pytest.approx(wanted.item(), rel=1e-5)
    found.backward()
    assert student.lm_head.weight.grad.any()


@pytest.mark.parametrize("labelled", [False, True])
def test_texts_of_one_length_need_no_mask(root: Path, capsys: pytest.CaptureFixture, labelled: bool) -> None:
    added(capsys, root, "llama")
    student = AutoModelForCausalLM.from_pretrained(root / "llama" / "new").eval()
    batch = {"input_ids": torch.tensor([[5, 6, 7, END], [8, 9, 10, END]])}
    batch |= {"labels": batch["input_ids"]} if labelled else {}
    masked = {**batch, "attention_mask": torch.ones_like(batch["input_ids"])}
    bare, wanted = (teacher_loss(student, "llama", each) for each in (batch, masked))
    assert bare.item() == pytest.approx(wanted.item(), rel=1e-6)


def test_an_encoder_decoders_teacher_reads_the_labels_of_the_decoder(root: Path, capsys: pytest.CaptureFixture) -> None:
    added(capsys, root, "t5")
    student = AutoModelForSeq2SeqLM.from_pretrained(root / "t5" / "new").eval()
    teacher = AutoModelForSeq2SeqLM.from_pretrained(root / "t5" / "tuned").eval()
    ids, labels = torch.tensor([[5, 6, 7, END]]), torch.tensor([[8, 9, END]])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    with torch.no_grad():
        p, q = ((model(**batch).logits[0] / 2.0).softmax(-1) for model in (teacher, student))
    wanted = 4.0 * (p * (p / q).log()).sum(-1).mean()
    assert teacher_loss(student, "t5", batch, temperature=2.0).item() == pytest.approx(wanted.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"teacher": "cached"}, "teacher: is cached, expected online"),
        ({"teacher_top_k": 4}, "teacher_top_k: is 4, expected null"),
        ({"teacher_cache": "answers"}, "teacher_cache: is answers, expected null"),
        ({"kd_reduction": "paper"}, "kd_reduction: is paper, expected batchmean"),
    ],
)
def test_what_means_nothing_over_a_vocabulary_is_refused(
    root: Path, settings: dict[str, Any], said: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    added(capsys, root, "llama")
    given = {
        **COMMON,
        "method": "both",
        "weights": "llama",
        "old_base": root / "llama" / "base",
        "base": root / "llama" / "new",
    }
    given |= {"task": root / "generation", "out": tmp_path / "out", **settings}
    file = tmp_path / "run.yaml"
    file.write_text("".join(f"{name}: {value}\n" for name, value in given.items()))
    capsys.readouterr()
    assert main(["recycle", str(file)]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# ---- strengths that are found


GROWTH = 1.5
FEW: dict[str, Any] = {"examples": 10, "seed": 20}


@pytest.fixture(scope="module")
def known(root: Path) -> list[list[str]]:
    """Two other chats' weights on both bases of the Llama, the difference on the new one 1.5 times as large."""
    store, task = api.Store(root / "store"), shutil.copytree(root / "generation", root / "others")
    for seed in (31, 32):
        for when, base, size in (("old", "base", 0.05), ("new", "new", 0.05 * GROWTH)):
            tuned = Path(shutil.copytree(root / "llama" / base, root / f"known-{when}-{seed}"))
            file, noise = tuned / "model.safetensors", torch.Generator().manual_seed(seed)
            tensors = {n: t + size * torch.randn(t.shape, generator=noise) for n, t in sorted(load_file(file).items())}
            save_file(tensors, file, metadata={"format": "pt"})
            store.add(f"known-{when}-{seed}", tuned, str(root / "llama" / base), task=str(task))
    return [[f"known-{when}-{seed}" for when in ("old", "new")] for seed in (31, 32)]


def at_strengths(root: Path, scales: dict[str, float], factor: float) -> dict[str, torch.Tensor]:
    """The new base with the chat's differences, each times its group's strength and the factor."""
    old, new, tuned = (load_file(root / "llama" / name / "model.safetensors") for name in ("base", "new", "tuned"))

    def group(name: str) -> str:
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        return f"layer {layer[1]}" if layer else "embeddings" if "embed_tokens" in name else "other"

    return {n: new[n] + scales.get("all", scales.get(group(n))) * factor * (tuned[n] - old[n]) for n in new}


def require_lowest_loss(root: Path, told: dict[str, Any], factor: float) -> None:
    """Losses that were told are plain transformers' at these strengths, and none is lower than the one chosen."""
    few = limit(load_task(str(root / "generation")).splits["dev"], FEW["examples"], FEW["seed"])
    rows = [{"prompt": text, "response": said} for text, said in zip(few.texts, few.labels, strict=True)]
    model = AutoModelForCausalLM.from_pretrained(root / "llama" / "new").eval()
    tokenizer = AutoTokenizer.from_pretrained(root / "llama" / "new")

    def loss(scales: dict[str, float]) -> float:
        model.load_state_dict(at_strengths(root, scales, factor))
        return -log_likelihood(model, tokenizer, rows)

    tried = told["loss_by_common_strength"]
    assert told["strength"].keys() == {"embeddings", "layer 0", "layer 1", "other"}
    assert told["loss"] == pytest.approx(loss(told["strength"]), rel=1e-4) and told["loss"] <= min(tried.values())
    for strength in ("0.0", "0.5", "1.0"):
        assert tried[strength] == pytest.approx(loss({"all": float(strength)}), rel=1e-4)


def test_apply_finds_a_scale_for_each_layer_group_by_how_likely_responses_are(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    added(capsys, root, "llama")
    argv = ("--weights", "llama", "--base", root / "llama" / "new", "--task", root / "generation", "--scale", "auto")
    told = run(capsys, "apply", *argv, "--examples", FEW["examples"], "--out", tmp_path / "out")["strength"]
    require_lowest_loss(root, told, 1.0)
    found, wanted = load_file(tmp_path / "out" / "model.safetensors"), at_strengths(root, told["strength"], 1.0)
    assert found.keys() == wanted.keys()
    assert all(torch.allclose(found[name], value, atol=1e-6) for name, value in wanted.items())


@pytest.mark.parametrize(("method", "factor"), [("apply", 1.0), ("project", GROWTH)])
def test_recycling_with_scale_auto_finds_them_for_answers_too(
    root: Path, known: list[list[str]], method: str, factor: float, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    added(capsys, root, "llama")
    new, more = root / "llama" / "new", {"project_from": known} if method == "project" else {}
    told = {"base": str(new), "old_base": str(root / "llama" / "base"), "weights": "llama", "scale": "auto"}
    found = api.recycle(
        **{**told, "task": str(root / "generation"), "out": str(tmp_path / "out"), "method": method, **more},
        **{"strength_examples": FEW["examples"], "seed": FEW["seed"]},
    )
    strength = read_manifest(tmp_path / "out").recycled_from["strength"]
    require_lowest_loss(root, strength, factor)
    values = dict(carry(tmp_path / "out", new).named_parameters())
    for name, value in at_strengths(root, strength["strength"], factor).items():
        assert torch.allclose(values[name], value, atol=1e-4), name
    (scored,) = api.evaluate(tmp_path / "out", str(new), str(root / "generation"), split="dev")["runs"]
    assert {f"dev_{metric}": value for metric, value in found["dev"].items()}.items() <= scored.items()
