"""A model card: the Hub reads its front matter, its Python runs, and nothing that a stranger wrote breaks it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from transformers import BertConfig, GPT2Config, LlamaConfig, PretrainedConfig, T5Config

from recyclable.report.model_card import Card, text, tuned_rows, tuned_scores, write_card

PRINT = {"weights": "0123456789abcdef" * 4, "tokenizer": "t", "config": "c"}
BASE = {
    "name": "org/new",
    "fingerprint": PRINT,
    "ancestors": [
        {"name": "org/middle", "fingerprint": {**PRINT, "weights": "f" * 64}, "declared": True},
        {"name": "org/old", "fingerprint": {**PRINT, "weights": "e" * 64}},
    ],
}
MANIFEST: dict[str, Any] = {
    "task": {"name": "reviews", "problem": "generation", "labels": []},
    "tuning": {"tuning": "lora", "lora_r": 8, "target_modules": None},
    "method": "init",
    "metrics": {"metric": "exact_match", "dev": {"exact_match": 0.5}, "test": {"exact_match": 0.25, "f1": None}},
    "recycled_from": {"base": {"name": "org/old", "fingerprint": {**PRINT, "weights": "e" * 64}}},
    "settings": {"max_length": 512},
}


def card(**changed: Any) -> Card:
    given = {
        "title": "merged",
        "about": "Weights on a base.",
        "base": BASE,
        "relation": "finetune",
        "config": LlamaConfig(),
        "architecture": "LlamaForCausalLM",
        "tags": ["generation", "lora"],
        "rows": tuned_rows(MANIFEST),
        "scores": tuned_scores(MANIFEST),
    }
    return Card(**{**given, **changed})


def test_the_hub_reads_its_front_matter(tmp_path: Path) -> None:
    write_card(card(), tmp_path)
    found = ModelCard.load(tmp_path / "README.md").data.to_dict()
    assert found["base_model"] == "org/new" and found["library_name"] == "transformers"
    assert found["pipeline_tag"] == "text-generation" and found["tags"] == ["recyclable", "generation", "lora"]
    write_card(card(relation="adapter"), tmp_path)
    assert ModelCard.load(tmp_path / "README.md").data.library_name == "peft"


def test_base_lineage_method_and_scores_are_named() -> None:
    lines = text(card()).splitlines()
    at = lines.index("## Where its base comes from")
    claimed = f"- `org/middle` ({'f' * 12}), by its user's claim"
    assert lines[at + 2 : at + 5] == ["- `org/new` (0123456789ab)", claimed, f"- `org/old` ({'e' * 12})"]
    for row in (
        "| task | reviews (generation) |",
        "| tuning | lora (lora_r 8) |",
        "| method | init |",
        f"| recycled from | weights of 'org/old' ({'e' * 12}) |",
        "| tokens that a text is cut at | 512 |",
        "| score, dev exact_match | 0.5000 |",
        "| score, test exact_match | 0.2500 |",
    ):
        assert row in lines
    assert not any("labels" in line or "f1" in line for line in lines), "what there is none of is left out"


@pytest.mark.parametrize(
    ("config", "architecture", "tag", "auto"),
    [
        (GPT2Config(), "GPT2LMHeadModel", "text-generation", "AutoModelForCausalLM"),
        (T5Config(), "T5ForConditionalGeneration", "text2text-generation", "AutoModelForSeq2SeqLM"),
        (BertConfig(), "BertForMaskedLM", "fill-mask", "AutoModelForMaskedLM"),
        (LlamaConfig(), "LlamaForSequenceClassification", "text-classification", "AutoModelForSequenceClassification"),
        (BertConfig(), "BertForTokenClassification", "token-classification", "AutoModelForTokenClassification"),
        (BertConfig(), "BertModel", None, "AutoModel"),
    ],
)
def test_the_class_that_opens_it_is_derived(
    config: PretrainedConfig, architecture: str, tag: str | None, auto: str
) -> None:
    made = text(card(config=config, architecture=architecture))
    assert yaml.safe_load(made.split("---")[1]).get("pipeline_tag") == tag
    (python,) = re.findall("```python\n(.*?)```", made, flags=re.DOTALL)
    assert f"from transformers import {auto}, AutoTokenizer\n" in python
    assert f"model = {auto}.from_pretrained('merged')\n" in python


def test_how_to_load_an_adapter_says_its_base_and_labels() -> None:
    before = ["import something"]
    made = text(card(relation="adapter", labels=3, architecture="LlamaForSequenceClassification", before=before))
    (python,) = re.findall("```python\n(.*?)```", made, flags=re.DOTALL)
    assert python.splitlines() == [
        "import something",
        "from peft import PeftModel",
        "from transformers import AutoModelForSequenceClassification, AutoTokenizer",
        "",
        "base = AutoModelForSequenceClassification.from_pretrained('org/new', num_labels=3)",
        "model = PeftModel.from_pretrained(base, 'merged')",
        "tokenizer = AutoTokenizer.from_pretrained('merged')",
    ]


def test_what_a_stranger_wrote_stays_one_line() -> None:
    evil = "x\n---\n# y | `z`\r\u2028```\x1b[2J"
    manifest = {**MANIFEST, "task": {"name": evil, "problem": "generation", "labels": [evil, "b"]}, "method": evil}
    base = {"name": evil, "fingerprint": PRINT}
    made = text(card(title=evil, base=base, tags=[evil], rows=tuned_rows(manifest)))
    front = yaml.safe_load(made.split("\n---\n")[0].removeprefix("---\n"))
    assert front["base_model"] == evil and front["tags"] == ["recyclable", evil]
    body = made.split("\n---\n", 1)[1]
    assert [line for line in body.splitlines() if line.startswith(("#", "---"))] == [
        f"# {'x --- # y ' + chr(92)}| 'z' ''' [2J",
        "## Where its base comes from",
        "## How to load it",
    ]
    assert body.count("```") == 2 and "\x1b" not in body
    (python,) = re.findall("```python\n(.*?)```", body, flags=re.DOTALL)
    compile(python, "card", "exec")
