"""Language models tuned elsewhere leave whole: plain transformers and peft say what ours says, and stop there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from chats import ASKED, NEW, Chats, moved, save
from decoders import END, PAD, SPECIALS, decoder, decoder_config, make_decoder
from peft import PeftModel
from tokenizers import Tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)
from worlds import WORDS, make_base, make_corpus, make_upgraded, write_config

from recyclable import carry
from recyclable.cli import main
from recyclable.weights.manifest import read_manifest
from recyclable.weights.store import VARIABLE

FAMILIES = ("llama", "gpt2", "t5")
READER = """
import json, sys
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, pipeline

folder, encoder, most, asked = sys.argv[1], sys.argv[2] == "t5", int(sys.argv[3]), json.loads(sys.argv[4])
model = (AutoModelForSeq2SeqLM if encoder else AutoModelForCausalLM).from_pretrained(folder)
tokenizer, found = AutoTokenizer.from_pretrained(folder), {"answers": [], "said": []}
talk = None if encoder else pipeline("text-generation", folder)
for text in asked:
    messages = [{"role": "user", "content": text}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
    (row,) = model.generate(**ids, do_sample=False, max_new_tokens=most).tolist()
    found["answers"].append(row[1 if encoder else ids["input_ids"].shape[1]:])
    if talk is not None:
        told = talk(messages, do_sample=False, max_new_tokens=most)
        found["said"].append(told[0]["generated_text"][-1]["content"])
found["texts"] = tokenizer.batch_decode(found["answers"], skip_special_tokens=True)
ends, cut = model.generation_config.eos_token_id, []
for answer in found["answers"]:
    stop = next((place for place, token in enumerate(answer) if token in ends), len(answer))
    cut.append(answer[:stop])
found["before the end"] = tokenizer.batch_decode(cut, skip_special_tokens=True)
assert not any(name.partition(".")[0] == "recyclable" for name in sys.modules)
print(json.dumps(found))
"""


class Worlds:
    """A world per family, made when it is first asked for, with its weights in the store."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._made = folder, {}

    def __getitem__(self, family: str) -> Chats:
        if family not in self._made:
            chats = self._made[family] = Chats(self.folder / family, family)
            for name in ("tuned", "lora"):
                add(getattr(chats, name), chats.base, f"{family}-{name}")
        return self._made[family]


def run(*command: object) -> None:
    assert main([str(part) for part in command]) == 0


def add(tuned: Path, base: Path, name: str) -> None:
    run("store", "add", "--tuned", tuned, "--base", base, "--name", name)


def export(name: str, base: Path, out: Path, form: str = "--merged") -> Path:
    run("store", "export", name, form, "--base", base, "--out", out)
    return out


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory):
    root = tmp_path_factory.mktemp("languages")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, str(root / "store"))
        yield Worlds(root)


def answers(tmp: Path, capsys: pytest.CaptureFixture, *weights: object) -> list[str]:
    """What `recyclable generate` says."""
    rows = [{"messages": [{"role": "user", "content": text}]} for text in ASKED]
    (tmp / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    capsys.readouterr()
    run("generate", *weights, "--prompts", tmp / "asked.jsonl", "--max-new-tokens", NEW, "--json")
    return [row["response"] for row in json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]]


def elsewhere(tmp: Path, folder: Path, family: str) -> dict[str, Any]:
    """What plain transformers says, in a process without recyclable."""
    (tmp / "reader.py").write_text(READER)
    ended = subprocess.run(
        [sys.executable, "reader.py", str(folder), family, str(NEW), json.dumps(ASKED)],
        cwd=tmp,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout.splitlines()[-1])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_merged_chat_model_says_the_same_in_plain_transformers(
    worlds: Worlds, tmp_path: Path, capsys: pytest.CaptureFixture, family: str
) -> None:
    chats = worlds[family]
    out = export(f"{family}-tuned", chats.upgraded, tmp_path / "out")
    found = elsewhere(tmp_path, out, family)
    ours = answers(tmp_path, capsys, "--weights", f"{family}-tuned", "--base", chats.upgraded)
    assert found["before the end"] == ours and len(set(ours)) > 2, "and they depend on what was asked"
    own = chats.load()
    told, oracle = own.generation_config, chats.summed(own)
    told.decoder_start_token_id = PAD if oracle.config.is_encoder_decoder else None
    oracle.generation_config, encoder = told, oracle.config.is_encoder_decoder
    for text, answer in zip(ASKED, found["answers"], strict=True):
        messages = [{"role": "user", "content": text}]
        ids = chats.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
        (row,) = oracle.generate(**ids, do_sample=False, max_new_tokens=NEW).tolist()
        assert row[1 if encoder else ids["input_ids"].shape[1] :] == answer
    assert {len(answer) for answer in found["answers"]} > {NEW}, "some stop by themselves, others are cut"
    if not encoder:
        assert found["said"] == found["texts"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("base", ["base", "upgraded"])
def test_a_lora_has_the_same_logits_in_plain_peft(worlds: Worlds, tmp_path: Path, family: str, base: str) -> None:
    chats = worlds[family]
    onto = getattr(chats, base)
    auto = AutoModelForSeq2SeqLM if family == "t5" else AutoModelForCausalLM
    out = export(f"{family}-lora", onto, tmp_path / "out", "--peft")
    peft = PeftModel.from_pretrained(auto.from_pretrained(onto), out).eval()
    first = PeftModel.from_pretrained(auto.from_pretrained(onto), chats.lora).eval()
    merged = auto.from_pretrained(export(f"{family}-lora", onto, tmp_path / "merged")).eval()
    inputs = {"input_ids": torch.arange(5, 53).reshape(4, 12)}
    if family == "t5":
        inputs["decoder_input_ids"] = torch.arange(60, 84).reshape(4, 6)
    with torch.no_grad():
        bare = auto.from_pretrained(onto).eval()(**inputs).logits
        ours, theirs, own, folded = (
            model(**inputs).logits for model in (carry(f"{family}-lora", to=onto), peft, first, merged)
        )
    assert torch.equal(own, theirs)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    torch.testing.assert_close(folded, theirs, rtol=0, atol=1e-4)
    assert (bare - theirs).abs().max() > 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_what_leaves_is_a_language_model_with_all_that_belongs_to_it(
    worlds: Worlds, tmp_path: Path, family: str
) -> None:
    chats = worlds[family]
    out = export(f"{family}-tuned", chats.upgraded, tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == [type(chats.load()).__name__] and "generation_config" not in config
    told = json.loads((out / "generation_config.json").read_text())
    assert told["eos_token_id"] == [chats.tokenizer.eos_token_id, END] and told["pad_token_id"] == PAD
    assert told["do_sample"] is True and told["repetition_penalty"] == 1.05
    assert AutoTokenizer.from_pretrained(out).chat_template == chats.tokenizer.chat_template
    card = (out / "README.md").read_text()
    tag = "text2text-generation" if family == "t5" else "text-generation"
    assert f"base_model: {chats.upgraded}\n" in card and f"pipeline_tag: {tag}\n" in card
    assert f"- `{chats.base}`" in card and "generation" in card and "| chat template | the weights' own |" not in card
    peft = export(f"{family}-lora", chats.upgraded, tmp_path / "peft", "--peft")
    assert "library_name: peft\n" in (peft / "README.md").read_text()
    ends = json.loads((peft / "generation_config.json").read_text())["eos_token_id"]
    assert ends in (END, [END]), "the base's"


def test_a_model_tuned_with_a_chat_template_has_a_tokenizer_of_its_own(worlds: Worlds) -> None:
    """An instruct model of a base without a template."""
    chats = worlds["llama"]
    manifest = read_manifest(worlds.folder / "store" / "llama-tuned")
    assert {"chat_template.jinja", "tokenizer.json"} <= set(manifest.tokenizer["files"])
    assert manifest.task["problem"] == "generation" and manifest.config["generation_config"]["temperature"] == 0.6
    assert manifest.base["fingerprint"]["chat_template"] is None
    assert AutoTokenizer.from_pretrained(chats.base).chat_template is None


def test_a_tuned_model_that_differs_in_its_template_alone_keeps_it(worlds: Worlds, tmp_path: Path) -> None:
    chats, tokenizer = worlds["gpt2"], AutoTokenizer.from_pretrained(worlds["gpt2"].base)
    tokenizer.chat_template = "w4 {{ messages[0]['content'] }}"
    tuned = save(AutoModelForCausalLM.from_pretrained(chats.tuned), tmp_path / "tuned", tokenizer)
    add(tuned, chats.base, "templated")
    out = export("templated", chats.upgraded, tmp_path / "out")
    assert AutoTokenizer.from_pretrained(out).chat_template == tokenizer.chat_template


def test_the_generation_config_is_the_base_s_where_weights_brought_none(worlds: Worlds, tmp_path: Path) -> None:
    chats = worlds["gpt2"]
    plain = AutoModelForCausalLM.from_pretrained(chats.tuned)
    save(plain, tmp_path / "tuned", AutoTokenizer.from_pretrained(chats.base))
    (tmp_path / "tuned" / "generation_config.json").unlink()
    add(tmp_path / "tuned", chats.base, "without")
    out = export("without", chats.base, tmp_path / "out")
    told = json.loads((out / "generation_config.json").read_text())
    assert told["eos_token_id"] in (END, [END]) and "temperature" not in told


def test_tokens_that_it_names_follow_their_rows(worlds: Worlds, tmp_path: Path) -> None:
    """A new base with another vocabulary: the same words in other rows, one more."""
    base = make_decoder(tmp_path / "base", "llama")
    model = moved(AutoModelForCausalLM.from_pretrained(base), seed=4)
    model.generation_config.eos_token_id = [END, 4 + 7]  # w7
    tuned = save(model, tmp_path / "tuned", AutoTokenizer.from_pretrained(base))
    add(tuned, base, "named")
    tokenizer = AutoTokenizer.from_pretrained(base)
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    words = [*SPECIALS, "new", *WORDS]
    content["model"]["vocab"] = {word: row for row, word in enumerate(words)}
    content["added_tokens"] = [{**token, "id": words.index(token["content"])} for token in content["added_tokens"]]
    upgraded = decoder(decoder_config("llama"), seed=2)
    other = type(tokenizer)(
        tokenizer_object=Tokenizer.from_str(json.dumps(content)), unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    save(upgraded, tmp_path / "up", other)
    run("lineage", "declare", tmp_path / "up", "--parent", base)
    out = export("named", tmp_path / "up", tmp_path / "out")
    told = json.loads((out / "generation_config.json").read_text())
    assert told["eos_token_id"] == [END, 5 + 7]
    assert AutoTokenizer.from_pretrained(out).convert_ids_to_tokens(5 + 7) == "w7"


def test_a_classifier_on_a_decoder_has_no_generation_config(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "store"))
    base = make_decoder(tmp_path / "base", "llama")
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3, pad_token_id=PAD)
    tokenizer = AutoTokenizer.from_pretrained(base, pad_token="<pad>")
    save(model, tmp_path / "tuned", tokenizer)
    add(tmp_path / "tuned", base, "n")
    out = export("n", base, tmp_path / "out")
    assert (base / "generation_config.json").is_file() and not (out / "generation_config.json").exists()
    assert json.loads((out / "config.json").read_text())["architectures"] == ["LlamaForSequenceClassification"]


def test_an_own_run_of_lora_on_a_decoder_opens_in_plain_peft(tmp_path: Path) -> None:
    base = make_decoder(tmp_path / "base", "llama")
    up = make_upgraded(base, tmp_path / "up")
    rows = [{"prompt": f"w{i} w{i + 1}", "response": f"w{i + 2}"} for i in range(24)]
    for split in ("train", "dev"):
        (tmp_path / "task").mkdir(exist_ok=True)
        (tmp_path / "task" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"base": base, "task": tmp_path / "task", "tuning": "lora", "lora_r": 2, "max_length": 16}
    steps = {"max_steps": 4, "train_batch_size": 8, "learning_rate": 0.05, "eval_every": 4}
    file = write_config(tmp_path / "tune.yaml", {**settings, **steps, "out": tmp_path / "tuned"})
    run("tune", file)
    inputs = {"input_ids": torch.arange(5, 29).reshape(2, 12)}
    for onto in (base, up):
        plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(onto), tmp_path / "tuned").eval()
        with torch.no_grad():
            ours, theirs = carry(tmp_path / "tuned", to=onto)(**inputs).logits, plain(**inputs).logits
            bare = AutoModelForCausalLM.from_pretrained(onto).eval()(**inputs).logits
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
        assert (bare - theirs).abs().max() > 1e-3


def test_an_upgraded_base_has_a_model_card(tmp_path: Path) -> None:
    base, corpus = make_base(tmp_path / "base"), make_corpus(tmp_path / "corpus", documents=20)
    steps = {"max_steps": 2, "train_batch_size": 4, "learning_rate": 1e-3, "max_length": 24, "eval_every": 2}
    file = write_config(
        tmp_path / "p.yaml", {"base": base, "corpus": {"train": corpus}, **steps, "out": tmp_path / "up"}
    )
    run("pretrain", file)
    card = (tmp_path / "up" / "README.md").read_text()
    assert f"base_model: {base}\n" in card and "pipeline_tag: fill-mask\n" in card
    lineage = json.loads((tmp_path / "up" / "lineage.json").read_text())
    assert (
        lineage["fingerprint"]["weights"][:12] in card
        and lineage["ancestors"][0]["fingerprint"]["weights"][:12] in card
    )
    assert f"| score, held-out after loss | {lineage['heldout']['after']['loss']:.4f} |" in card
