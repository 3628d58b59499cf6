"""What was tuned elsewhere means here what it meant there: labels, tokenizer, config, kind of problem and length.

The labels of each task are what plain transformers (peft) says of its texts, so the right score is 1 by construction.
"""

from __future__ import annotations

import copy
import json
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import normalizers
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    DebertaV2Config,
    DistilBertConfig,
    ModernBertConfig,
    PreTrainedModel,
)
from worlds import WORDS, make_model, make_tokenizer, make_upgraded, write_config

from recyclable import carry, carry_tokenizer
from recyclable.cli import main
from recyclable.recipes.evaluate import evaluate
from recyclable.weights.manifest import read_manifest
from recyclable.weights.store import VARIABLE

NAMES = ("entailment", "neutral", "contradiction")
SIZE = {"vocab_size": 208, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
LENGTH = 60
Says = Callable[[str], int]


def bert(folder: Path, **changed: Any) -> Path:
    """A base of 208 rows for 200 tokens, with room for some more."""
    torch.manual_seed(1)
    made = BertConfig(**{**SIZE, "max_position_embeddings": 64, "initializer_range": 0.2, **changed})
    return make_model(folder, BertForMaskedLM(made))


def tuned(base: Path, folder: Path | None, names: Sequence[str] | None = NAMES, **changed: Any) -> PreTrainedModel:
    """What plain transformers would have left behind: every weight moved, the head and config its own."""
    torch.manual_seed(2)
    named = (
        {} if names is None else {"id2label": dict(enumerate(names)), "label2id": {n: i for i, n in enumerate(names)}}
    )
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3, **named, **changed).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    balance(model)
    if folder is not None:
        model.save_pretrained(folder)
    return model


def lora(base: Path, folder: Path) -> PreTrainedModel:
    torch.manual_seed(3)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    config = LoraConfig(
        task_type="SEQ_CLS", r=4, target_modules=["query", "value"], modules_to_save=["classifier", "pooler"]
    )
    model = get_peft_model(model, config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter) * parameter.requires_grad
    balance(model)
    model.save_pretrained(folder)
    return model


@torch.no_grad()
def balance(model: PreTrainedModel) -> None:
    """Have the head say each of its three classes of some texts."""
    rows = [module for module in model.modules() if isinstance(module, torch.nn.Linear) and module.out_features == 3]
    found = torch.cat([model(torch.tensor([make_tokenizer()(text).input_ids])).logits for text in texts()])
    rows[-1].bias -= found.mean(0)


def says(model: PreTrainedModel, tokenizer: Any, length: int = LENGTH) -> Says:
    """Row of the head that plain transformers finds for a text."""

    def row(text: str) -> int:
        with torch.no_grad():
            return int(
                model(**tokenizer(text, truncation=True, max_length=length, return_tensors="pt")).logits.argmax()
            )

    return row


def texts(count: int = 40, words: Sequence[str] = WORDS, length: tuple[int, int] = (3, 20)) -> list[str]:
    draw = random.Random(4)
    return [" ".join(draw.choice(words) for _ in range(draw.randint(*length))) for _ in range(count)]


def labelled(folder: Path, given: list[str], answer: Says, names: Sequence[str] = NAMES) -> Path:
    """A task whose labels are these answers; every label occurs in each split."""
    rows = [{"text": text, "label": names[answer(text)]} for text in given]
    assert {row["label"] for row in rows} == set(names), "the model says the same of every text"
    folder.mkdir(parents=True)
    for split in ("train", "dev", "test"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def with_class_labels(task: Path, folder: Path, names: Sequence[str] = NAMES) -> Path:
    """The same task as `datasets` writes it to Parquet, the order of the labels in its features."""
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=list(names))})
    folder.mkdir()
    for split in ("train", "dev", "test"):
        rows = [json.loads(line) for line in (task / f"{split}.jsonl").read_text().splitlines()]
        datasets.Dataset.from_list(rows, features=features).to_parquet(folder / f"{split}.parquet")
    return folder


class Runs:
    """Commands in this process, in a folder of their own."""

    def __init__(self, tmp: Path, capsys: pytest.CaptureFixture) -> None:
        self.tmp, self.capsys = tmp, capsys

    def run(self, *argv: object) -> str:
        status = main([str(each) for each in argv])
        captured = self.capsys.readouterr()
        assert status == 0, captured.err
        return captured.out

    def refused(self, *argv: object) -> str:
        before = sorted(self.tmp.rglob("*"))
        self.capsys.readouterr()
        status = main([str(each) for each in argv])
        lines = self.capsys.readouterr().err.strip().splitlines()
        assert (status, len(lines), sorted(self.tmp.rglob("*"))) == (2, 1, before), lines
        return lines[0]

    def add(self, folder: Path, base: Path, name: str, *options: object) -> Path:
        self.run("store", "add", "--tuned", folder, "--base", base, "--name", name, *options)
        return self.tmp / "store" / name

    def not_added(self, folder: Path, base: Path, *options: object) -> str:
        return self.refused("store", "add", "--tuned", folder, "--base", base, "--name", "never", *options)

    def export(self, name: str, base: Path, how: str = "--merged") -> Path:
        out = self.tmp / f"out-{name}-{base.name}{how}"
        self.run("store", "export", name, how, "--base", base, "--out", out)
        return out


@pytest.fixture
def runs(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Runs:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "store"))
    return Runs(tmp_path, capsys)


def score(weights: Path, base: Path, task: Path) -> float:
    return evaluate(weights, str(base), str(task))["accuracy"]


def evaluated(row: Says, task: Path, names: Sequence[str] = NAMES) -> float:
    """The share of a task's test texts that get their label."""
    rows = [json.loads(line) for line in (task / "test.jsonl").read_text().splitlines()]
    return sum(names[row(each["text"])] == each["label"] for each in rows) / len(rows)


def hardly_trained(runs: Runs, up: Path, base: Path, weights: str, task: Path) -> None:
    """Weights recycled for an upgrade into `r`, by one step that moves nothing."""
    places = {"base": up, "old_base": base, "weights": weights, "task": task, "out": runs.tmp / "r"}
    few = {"method": "init", "max_steps": 1, "learning_rate": 1e-9, "save_every": 0}
    runs.run("recycle", write_config(runs.tmp / "r.yaml", {**places, **few}))


# ---- 1: the order of the labels


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_head_without_names_has_its_rows_in_the_order_of_class_labels(runs: Runs, kind: str) -> None:
    base = bert(runs.tmp / "base")
    model = tuned(base, runs.tmp / "w", None) if kind == "full" else lora(base, runs.tmp / "w")
    strings = labelled(runs.tmp / "strings", texts(), says(model, make_tokenizer()))
    numbered = with_class_labels(strings, runs.tmp / "numbered")
    entry = runs.add(runs.tmp / "w", base, "n", "--task", numbered)
    assert read_manifest(entry).task["labels"] == list(NAMES)
    assert score(entry, base, numbered) == 1
    assert score(entry, base, strings) == 1, "the same names, in the order of the alphabet"
    out = runs.export("n", base)
    assert AutoModelForSequenceClassification.from_pretrained(out).config.id2label == dict(enumerate(NAMES))


def test_a_task_that_says_no_order_names_no_rows(runs: Runs) -> None:
    base = bert(runs.tmp / "base")
    model = tuned(base, runs.tmp / "w", None)
    task = labelled(runs.tmp / "task", texts(), says(model, make_tokenizer()))
    message = runs.not_added(runs.tmp / "w", base, "--task", task)
    assert "--labels: is missing" in message and "['contradiction', 'entailment', 'neutral']" in message
    assert message.endswith(f"what it says of 40 training texts fits {','.join(NAMES)}"), "what it shows is told"
    unnamed = runs.add(runs.tmp / "w", base, "unnamed")
    message = runs.refused("evaluate", "--weights", unnamed, "--base", base, "--task", task)
    assert "was tuned for labels ['LABEL_0', 'LABEL_1', 'LABEL_2']" in message and message.endswith("with --labels")
    entry = runs.add(runs.tmp / "w", base, "n", "--task", task, "--labels", ",".join(NAMES))
    assert score(entry, base, task) == 1
    (task / "task.yaml").write_text(f"train: train.jsonl\ntest: test.jsonl\nlabels: [{', '.join(NAMES)}]\n")
    assert score(runs.add(runs.tmp / "w", base, "m", "--task", task), base, task) == 1


def test_names_that_any_tool_would_number_alike_are_taken_unless_the_head_says_otherwise(runs: Runs) -> None:
    """Sorted, and as the training texts first have them: the same order, as long as the head agrees."""
    base = bert(runs.tmp / "base")
    model = tuned(base, runs.tmp / "w", None)
    row = says(model, make_tokenizer())
    given = sorted(texts(), key=lambda text: row(text))
    right = labelled(runs.tmp / "right", given, row, ("a", "b", "c"))
    assert score(runs.add(runs.tmp / "w", base, "n", "--task", right), base, right) == 1
    turned = labelled(runs.tmp / "turned", given[::-1], lambda text: 2 - row(text), ("a", "b", "c"))
    assert "fits c,b,a" in runs.not_added(runs.tmp / "w", base, "--task", turned)
    random_words = labelled(runs.tmp / "random", given, lambda text: given.index(text) % 3, ("a", "b", "c"))
    assert read_manifest(runs.add(runs.tmp / "w", base, "m", "--task", random_words)).task["labels"] == ["a", "b", "c"]


def test_integers_are_the_rows_themselves(runs: Runs) -> None:
    base = bert(runs.tmp / "base")
    model = tuned(base, runs.tmp / "w", None)
    task = labelled(runs.tmp / "task", texts(), says(model, make_tokenizer()), ("0", "1", "2"))
    assert score(runs.add(runs.tmp / "w", base, "n", "--task", task), base, task) == 1


def test_names_in_the_config_stay_and_are_not_contradicted(runs: Runs) -> None:
    base = bert(runs.tmp / "base")
    model = tuned(base, runs.tmp / "w")
    task = labelled(runs.tmp / "task", texts(), says(model, make_tokenizer()))
    assert score(runs.add(runs.tmp / "w", base, "n", "--task", task), base, task) == 1
    swapped = ",".join(reversed(NAMES))
    assert "names its labels" in runs.not_added(runs.tmp / "w", base, "--labels", swapped)
    assert "found 2 names" in runs.not_added(runs.tmp / "w", base, "--labels", "a,b")
    assert "at least two different names" in runs.not_added(runs.tmp / "w", base, "--labels", "a,a")


def test_recycled_weights_keep_the_order_of_the_old_head(runs: Runs) -> None:
    base = bert(runs.tmp / "base")
    model = tuned(base, runs.tmp / "w")
    up = make_upgraded(base, runs.tmp / "up", scale=0.0001)
    task = labelled(runs.tmp / "task", texts(), says(model, make_tokenizer()))
    runs.add(runs.tmp / "w", base, "n")
    settings = {"method": "apply", "base": up, "old_base": base, "weights": "n", "task": task, "out": runs.tmp / "r"}
    runs.run("recycle", write_config(runs.tmp / "r.yaml", settings))
    assert read_manifest(runs.tmp / "r").task["labels"] == list(NAMES)
    assert score(runs.tmp / "r", up, task) > 0.9


# ---- 2: the tokenizer


def cased_base(folder: Path) -> tuple[Path, Any]:
    """A base whose tokenizer lower-cases, with capital words in its vocabulary; and a tokenizer that does not."""
    words = [*WORDS[:150], *(word.upper() for word in WORDS[:45])]
    base = bert(folder)
    lower = make_tokenizer(words)
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    lower.save_pretrained(base)
    return base, make_tokenizer(words)


def test_the_tokenizer_that_weights_were_tuned_with_reads_for_them(runs: Runs) -> None:
    base, cased = cased_base(runs.tmp / "base")
    model = tuned(base, runs.tmp / "w")
    cased.save_pretrained(runs.tmp / "w")
    both = texts(60, [*WORDS[:45], *(word.upper() for word in WORDS[:45])])
    task = labelled(runs.tmp / "task", both, says(model, cased))
    entry = runs.add(runs.tmp / "w", base, "n", "--task", task)
    assert score(entry, base, task) == 1
    up = make_upgraded(base, runs.tmp / "up", scale=0.0001)
    hardly_trained(runs, up, base, "n", task)
    for weights, on in ((entry, base), (runs.tmp / "r", up)):
        assert carry_tokenizer(weights, on)("W1 w1").input_ids == cased("W1 w1").input_ids
        assert score(weights, on, task) > 0.9
    assert AutoTokenizer.from_pretrained(runs.export("n", up))("W1 w1").input_ids == cased("W1 w1").input_ids


def test_a_tokenizer_may_be_named(runs: Runs) -> None:
    base, cased = cased_base(runs.tmp / "base")
    model = lora(base, runs.tmp / "w")
    cased.save_pretrained(runs.tmp / "cased")
    task = labelled(runs.tmp / "task", texts(60, [*WORDS[:45], *(w.upper() for w in WORDS[:45])]), says(model, cased))
    named = ("--labels", ",".join(NAMES), "--tokenizer")
    assert "holds no tokenizer" in runs.not_added(runs.tmp / "w", base, *named, runs.tmp / "task")
    entry = runs.add(runs.tmp / "w", base, "n", *named, runs.tmp / "cased")
    assert score(entry, base, task) == 1
    out = runs.export("n", base, "--peft")
    again = PeftModel.from_pretrained(
        AutoModelForSequenceClassification.from_pretrained(base, num_labels=3), out
    ).eval()
    row = says(again, AutoTokenizer.from_pretrained(out))
    assert all(row(text) == says(model, cased)(text) for text in texts(20, [w.upper() for w in WORDS[:45]]))


def test_the_side_that_texts_are_cut_on_belongs_to_it(runs: Runs) -> None:
    base = bert(runs.tmp / "base")
    model, left = tuned(base, runs.tmp / "w"), AutoTokenizer.from_pretrained(base, truncation_side="left")
    left.save_pretrained(runs.tmp / "w")
    task = labelled(runs.tmp / "task", texts(60, length=(70, 90)), says(model, left, 20))
    entry = runs.add(runs.tmp / "w", base, "n", "--max-length", 20)
    assert score(entry, base, task) == 1
    assert AutoTokenizer.from_pretrained(runs.export("n", base)).truncation_side == "left"


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_chat_template_goes_along_and_is_told(runs: Runs, kind: str) -> None:
    base, own = bert(runs.tmp / "base"), make_tokenizer()
    (tuned if kind == "full" else lora)(base, runs.tmp / "w")
    own.chat_template = "{% for message in messages %}w1 {{ message['content'] }} {% endfor %}"
    own.save_pretrained(runs.tmp / "w")
    runs.add(runs.tmp / "w", base, "n")
    assert json.loads(runs.run("store", "show", "n", "--json").splitlines()[-1])["chat_template"] is True
    assert f"{'chat_template':14}True" in runs.run("store", "show", "n")
    said = [{"role": "user", "content": "w7"}]
    up = make_upgraded(base, runs.tmp / "up")
    hardly_trained(
        runs,
        up,
        base,
        "n",
        labelled(
            runs.tmp / "task",
            texts(),
            lambda text: len(text) % 3,
            NAMES if kind == "full" else ("LABEL_0", "LABEL_1", "LABEL_2"),
        ),
    )
    exported = runs.export("n", up, "--merged" if kind == "full" else "--peft")
    readers = [AutoTokenizer.from_pretrained(exported), carry_tokenizer("n", up), carry_tokenizer(runs.tmp / "r", up)]
    for reader in readers:
        assert reader.apply_chat_template(said, tokenize=False) == own.apply_chat_template(said, tokenize=False)


def test_weights_without_a_tokenizer_of_their_own_have_the_base_s_template(runs: Runs) -> None:
    base, own = bert(runs.tmp / "base"), make_tokenizer()
    own.chat_template = "{{ messages[0]['content'] }}"
    own.save_pretrained(base)
    tuned(base, runs.tmp / "w")
    runs.add(runs.tmp / "w", base, "n")
    assert json.loads(runs.run("store", "show", "n", "--json").splitlines()[-1])["chat_template"] is None
    assert AutoTokenizer.from_pretrained(runs.export("n", base)).chat_template == own.chat_template


def test_tokens_added_for_an_adapter_are_read(runs: Runs) -> None:
    """New pieces in spare rows of the embedding, which the adapter trained."""
    base, more = bert(runs.tmp / "base"), make_tokenizer()
    more.add_tokens(["<x>", "<y>", "<z>"])
    ids = more.convert_tokens_to_ids(["<x>", "<y>", "<z>"])
    torch.manual_seed(5)
    config = LoraConfig(
        task_type="SEQ_CLS",
        r=2,
        target_modules=["query"],
        modules_to_save=["classifier", "pooler"],
        trainable_token_indices={"word_embeddings": ids},
    )
    model = get_peft_model(AutoModelForSequenceClassification.from_pretrained(base, num_labels=3), config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.5 * torch.randn_like(parameter) * parameter.requires_grad
    balance(model)
    model.save_pretrained(runs.tmp / "w")
    more.save_pretrained(runs.tmp / "w")
    task = labelled(runs.tmp / "task", texts(60, [*WORDS[:9], "<x>", "<y>", "<z>"]), says(model, more))
    entry = runs.add(runs.tmp / "w", base, "n", "--labels", ",".join(NAMES), "--task", task)
    assert score(entry, base, task) == 1
    up = make_upgraded(base, runs.tmp / "up", scale=0.0001)
    hardly_trained(runs, up, base, "n", task)
    assert score(runs.tmp / "r", up, task) > 0.9
    plain = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    out = runs.export("n", base, "--peft")
    row = says(PeftModel.from_pretrained(plain, out).eval(), AutoTokenizer.from_pretrained(out))
    assert all(row(text) == says(model, more)(text) for text in texts(20, [*WORDS[:9], "<x>", "<y>", "<z>"]))
    merged = runs.export("n", up)
    row = says(AutoModelForSequenceClassification.from_pretrained(merged).eval(), AutoTokenizer.from_pretrained(merged))
    assert evaluated(row, task) > 0.9


def test_tokens_that_need_rows_which_the_base_lacks_are_refused_at_once(runs: Runs) -> None:
    """As peft saves an adapter of a model whose embeddings were enlarged: with all of them."""
    base, more = bert(runs.tmp / "base"), make_tokenizer()
    more.add_tokens([f"<{i}>" for i in range(10)])
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    model.resize_token_embeddings(len(more))
    given = {"task_type": "SEQ_CLS", "r": 2, "target_modules": ["query"], "modules_to_save": ["classifier", "pooler"]}
    for name, trained in (("whole", {}), ("rows", {"trainable_token_indices": {"word_embeddings": [5, 208, 209]}})):
        adapter = get_peft_model(copy.deepcopy(model), LoraConfig(**given, **trained))
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter += 0.5 * torch.randn_like(parameter) * parameter.requires_grad
        adapter.save_pretrained(runs.tmp / name)
        more.save_pretrained(runs.tmp / name)
        message = runs.not_added(runs.tmp / name, base, "--labels", ",".join(NAMES))
        assert "its tokenizer has 210 pieces, but its embedding only 208 rows" in message
        for file in (runs.tmp / name).glob("tokenizer*"):
            file.unlink()
        assert "208" in runs.not_added(runs.tmp / name, base, "--labels", ",".join(NAMES))


def test_a_tokenizer_with_the_base_s_pieces_in_other_rows_is_another_base_s(runs: Runs) -> None:
    base = bert(runs.tmp / "base")
    tuned(base, runs.tmp / "w")
    make_tokenizer(WORDS[::-1]).save_pretrained(runs.tmp / "w")
    assert "has another vocabulary" in runs.not_added(runs.tmp / "w", base)


def test_a_tokenizer_of_its_own_needs_the_base_s_rows(runs: Runs) -> None:
    base, cased = cased_base(runs.tmp / "base")
    tuned(base, runs.tmp / "w")
    cased.save_pretrained(runs.tmp / "w")
    runs.add(runs.tmp / "w", base, "n")
    other = make_upgraded(base, runs.tmp / "other")
    words = [*WORDS[:150], *(word.upper() for word in WORDS[:45])]
    make_tokenizer(words[::-1]).save_pretrained(other)
    record = json.loads((other / "lineage.json").read_text())
    (other / "lineage.json").unlink()
    assert record
    runs.run("lineage", "declare", other, "--parent", base)
    assert "tokenizer" in runs.refused("apply", "--weights", "n", "--base", other, "--out", runs.tmp / "never")


# ---- 3: the config


FIELDS = {
    "classifier_pooling": (ModernBertConfig, "mean"),
    "classifier_activation": (ModernBertConfig, "relu"),
    "local_attention": (ModernBertConfig, 4),
    "norm_eps": (ModernBertConfig, 1e-2),
    "activation": (DistilBertConfig, "relu"),
    "pooler_hidden_act": (DebertaV2Config, "tanh"),
    "hidden_act": (BertConfig, "relu"),
}
SIZES: dict[type, dict[str, Any]] = {
    ModernBertConfig: {**SIZE, "pad_token_id": 0, "bos_token_id": 2, "cls_token_id": 2, "eos_token_id": 3}
    | {"sep_token_id": 3, "attn_implementation": "eager"},
    DistilBertConfig: {"vocab_size": 208, "dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64},
    DebertaV2Config: {**SIZE, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 16},
    BertConfig: SIZE,
}


@pytest.mark.parametrize("field", FIELDS)
def test_a_field_by_which_the_tuned_model_computes_otherwise_goes_along(runs: Runs, field: str) -> None:
    kind, value = FIELDS[field]
    torch.manual_seed(1)
    config = kind(**{**SIZES[kind], "max_position_embeddings": 64, "initializer_range": 0.2})
    plain = make_tokenizer()
    plain.model_input_names = ["input_ids", "attention_mask"]
    base = make_model(runs.tmp / "base", transformers.AutoModelForMaskedLM.from_config(config), plain)
    up = make_upgraded(base, runs.tmp / "up")
    assert getattr(config, field) != value
    model = tuned(base, runs.tmp / "w", **{field: value})
    entry = runs.add(runs.tmp / "w", base, "n")
    assert field in read_manifest(entry).config
    given = {"input_ids": torch.randint(5, 200, (4, 40)), "attention_mask": torch.ones(4, 40, dtype=torch.long)}

    def logits(of: Any) -> torch.Tensor:
        with torch.no_grad():
            return of(**given).logits

    def opened(folder: Path) -> PreTrainedModel:
        return AutoModelForSequenceClassification.from_pretrained(folder, attn_implementation="eager").eval()

    assert torch.equal(logits(opened(runs.export("n", base))), logits(opened(runs.tmp / "w")))
    moved = {n: t.clone() for n, t in model.state_dict().items()}
    files = [load_file(folder / "model.safetensors") for folder in (base, up)]
    for name in (n for n in moved.keys() & files[0].keys() if n.startswith(model.base_model_prefix)):
        moved[name] += files[1][name] - files[0][name]
    model.load_state_dict(moved)
    torch.testing.assert_close(logits(opened(runs.export("n", up))), logits(model), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits(carry(entry, to=up)), logits(model), atol=1e-5, rtol=1e-5)


def test_what_is_recycled_computes_as_the_outdated_weights_did(runs: Runs) -> None:
    base = bert(runs.tmp / "base")
    model = tuned(base, runs.tmp / "w", hidden_act="relu", layer_norm_eps=0.1)
    task = labelled(runs.tmp / "task", texts(), says(model, make_tokenizer()))
    entry, up = runs.add(runs.tmp / "w", base, "n"), make_upgraded(base, runs.tmp / "up", scale=0.0001)
    assert score(entry, base, task) == 1
    hardly_trained(runs, up, base, "n", task)
    assert read_manifest(runs.tmp / "r").config == {"hidden_act": "relu", "layer_norm_eps": 0.1}
    assert score(runs.tmp / "r", up, task) > 0.9
    runs.run("apply", "--weights", runs.tmp / "r", "--base", up, "--out", runs.tmp / "out")
    again = AutoModelForSequenceClassification.from_pretrained(runs.tmp / "out").eval()
    assert evaluated(says(again, make_tokenizer()), task) > 0.9


def test_bookkeeping_changes_nothing(runs: Runs) -> None:
    base = bert(runs.tmp / "base")
    tuned(base, runs.tmp / "w", hidden_dropout_prob=0.3, classifier_dropout=0.2, use_cache=False)
    config = json.loads((runs.tmp / "w/config.json").read_text())
    more = {"finetuning_task": "mnli", "_name_or_path": "elsewhere", "transformers_version": "4.1.0"}
    (runs.tmp / "w/config.json").write_text(json.dumps({**config, **more}))
    tokenizer = make_tokenizer()
    tokenizer.model_max_length = 50
    tokenizer.save_pretrained(runs.tmp / "w")
    manifest = read_manifest(runs.add(runs.tmp / "w", base, "n"))
    assert (manifest.config, manifest.tokenizer) == ({}, None)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("max_position_embeddings", 128, "position_embeddings.weight is (64, 32), by its own config (128, 32)"),
        ("type_vocab_size", 1, "token_type_embeddings.weight is (2, 32), by its own config (1, 32)"),
        ("vocab_size", 256, "word_embeddings.weight is (208, 32), by its own config (256, 32)"),
        ("architectures", [7], "architectures is [7], expected a list of names"),
        ("architectures", "BertModel", "architectures is 'BertModel', expected a list of names"),
    ],
)
def test_a_config_that_its_own_weights_do_not_fit_is_refused(runs: Runs, field: str, value: Any, said: str) -> None:
    """As plain transformers would; never taken and found out later."""
    base = bert(runs.tmp / "base")
    tuned(base, runs.tmp / "w")
    config = json.loads((runs.tmp / "w/config.json").read_text())
    (runs.tmp / "w/config.json").write_text(json.dumps({**config, field: value}))
    assert said in runs.not_added(runs.tmp / "w", base)


def test_another_kind_of_model_is_refused(runs: Runs) -> None:
    base = bert(runs.tmp / "base")
    tuned(base, runs.tmp / "w")
    config = json.loads((runs.tmp / "w/config.json").read_text())
    (runs.tmp / "w/config.json").write_text(json.dumps({**config, "model_type": "roberta"}))
    assert "is a roberta" in runs.not_added(runs.tmp / "w", base)


# ---- 4: the kind of problem


def probabilities(model: Path, tokenizer: Path, text: str = "w1 w2 w3") -> dict[str, float]:
    reader = AutoTokenizer.from_pretrained(tokenizer)
    (found,) = transformers.pipeline("text-classification", model=str(model), tokenizer=reader, top_k=None)([text])
    return {row["label"]: row["score"] for row in found}


def test_several_labels_at_once_stay_several(runs: Runs) -> None:
    base = bert(runs.tmp / "base")
    model = tuned(base, runs.tmp / "w", problem_type="multi_label_classification")
    entry = runs.add(runs.tmp / "w", base, "n")
    assert probabilities(runs.export("n", base), base) == pytest.approx(probabilities(runs.tmp / "w", base))
    single = labelled(runs.tmp / "single", texts(), says(model, make_tokenizer()))
    assert read_manifest(entry).task["problem"] == "multi_label"
    message = runs.refused("evaluate", "--weights", "n", "--base", base, "--task", single)
    assert "was tuned for multi_label, the task single is classification" in message


def test_a_base_s_own_problem_type_is_an_earlier_task_s(runs: Runs) -> None:
    base = bert(runs.tmp / "base", problem_type="multi_label_classification")
    clean = bert(runs.tmp / "clean")
    model = tuned(clean, runs.tmp / "w")
    task = labelled(runs.tmp / "task", texts(), says(model, make_tokenizer()))
    few = {"max_steps": 1, "learning_rate": 1e-3, "max_length": 32, "save_every": 0}
    runs.run("tune", write_config(runs.tmp / "t.yaml", {"base": base, "task": task, "out": runs.tmp / "t", **few}))
    runs.run("apply", "--weights", runs.tmp / "t", "--base", base, "--out", runs.tmp / "out")
    assert sum(probabilities(runs.tmp / "out", base).values()) == pytest.approx(1)


def test_one_number_between_0_and_1_stays_one(runs: Runs) -> None:
    """Of a head of one row without a problem type transformers' pipeline takes the sigmoid; of a regression not."""
    base = bert(runs.tmp / "base")
    for name, kind in (("unsaid", None), ("regression", "regression")):
        torch.manual_seed(2)
        made = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, problem_type=kind)
        made.save_pretrained(runs.tmp / name)
        runs.add(runs.tmp / name, base, name)
        assert probabilities(runs.export(name, base), base) == pytest.approx(probabilities(runs.tmp / name, base))


@pytest.mark.parametrize(
    ("kind", "name"), [(None, "LABEL_0"), ("regression", "stars"), ("multi_label_classification", "spam")]
)
def test_one_number_of_an_adapter_stays_one_too(runs: Runs, kind: str | None, name: str) -> None:
    """Where its model's config lies beside it."""
    base = bert(runs.tmp / "base")
    torch.manual_seed(2)
    head = {"num_labels": 1, "problem_type": kind, "id2label": {0: name}, "label2id": {name: 0}}
    model = AutoModelForSequenceClassification.from_pretrained(base, **head)
    model.config.save_pretrained(runs.tmp / "w")
    config = LoraConfig(task_type="SEQ_CLS", target_modules=["query"], modules_to_save=["classifier", "pooler"])
    model = get_peft_model(model, config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter) * parameter.requires_grad
    model.save_pretrained(runs.tmp / "w")
    model.merge_and_unload().save_pretrained(runs.tmp / "plain")
    runs.add(runs.tmp / "w", base, "n")
    plain = probabilities(runs.tmp / "plain", base)
    assert probabilities(runs.export("n", base), base) == pytest.approx(plain, abs=1e-5)


# ---- 5: the length


def test_texts_are_cut_where_they_were_cut(runs: Runs) -> None:
    base = bert(runs.tmp / "base")
    model, tokenizer = tuned(base, runs.tmp / "w"), make_tokenizer()
    task = labelled(runs.tmp / "task", texts(60, length=(30, 90)), says(model, tokenizer, 40))
    tokenizer.save_pretrained(runs.tmp / "w")  # the last text was cut at 40
    entry = runs.add(runs.tmp / "w", base, "n")
    assert read_manifest(entry).settings["max_length"] == 40
    assert score(entry, base, task) == 1
    assert AutoTokenizer.from_pretrained(runs.export("n", base)).model_max_length == 40
    assert carry_tokenizer(entry, base).model_max_length == 40
    up = make_upgraded(base, runs.tmp / "up", scale=0.0001)
    settings = {"method": "apply", "base": up, "old_base": base, "weights": "n", "task": task, "out": runs.tmp / "r"}
    runs.run("recycle", write_config(runs.tmp / "r.yaml", settings))
    assert read_manifest(runs.tmp / "r").settings["max_length"] == 40
    assert score(runs.tmp / "r", up, task) > 0.9
    assert "was tuned at 40" in runs.run("recycle", runs.tmp / "r.yaml", "max_length=50", f"out={runs.tmp / 'r2'}")


def test_a_limit_of_the_tokenizer_or_of_the_positions_is_the_length(runs: Runs) -> None:
    base = bert(runs.tmp / "base")
    tuned(base, runs.tmp / "w")
    assert read_manifest(runs.add(runs.tmp / "w", base, "positions")).settings["max_length"] == 64
    tokenizer = make_tokenizer()
    tokenizer.model_max_length = 48
    tokenizer.save_pretrained(runs.tmp / "w")
    assert read_manifest(runs.add(runs.tmp / "w", base, "limit")).settings["max_length"] == 48
    assert read_manifest(runs.add(runs.tmp / "w", base, "told", "--max-length", 12)).settings["max_length"] == 12
    assert "has positions for 64" in runs.not_added(runs.tmp / "w", base, "--max-length", 65)
    assert "expected more than 2" in runs.not_added(runs.tmp / "w", base, "--max-length", 2)


def test_a_limit_that_is_no_number_is_refused(runs: Runs) -> None:
    base = bert(runs.tmp / "base")
    tuned(base, runs.tmp / "w")
    make_tokenizer().save_pretrained(runs.tmp / "w")
    settings = json.loads((runs.tmp / "w/tokenizer_config.json").read_text())
    (runs.tmp / "w/tokenizer_config.json").write_text(json.dumps({**settings, "model_max_length": "512"}))
    assert "model_max_length is '512', expected a number" in runs.not_added(runs.tmp / "w", base)


def test_models_that_compute_otherwise_are_not_merged(runs: Runs) -> None:
    base = bert(runs.tmp / "base")
    for name, changed in (("plain", {}), ("relu", {"hidden_act": "relu"})):
        tuned(base, runs.tmp / name, **changed)
        runs.add(runs.tmp / name, base, name)
    message = runs.refused("apply", "--weights", "plain", "relu", "--base", base, "--out", runs.tmp / "never")
    assert "was tuned with another hidden_act" in message


# ---- what a directory says is written down once


def test_a_run_of_recyclable_s_says_everything_itself(runs: Runs) -> None:
    base = bert(runs.tmp / "base")
    tuned(base, runs.tmp / "w")
    entry = runs.add(runs.tmp / "w", base, "n")
    assert "says it" in runs.not_added(entry, base, "--max-length", 12)
    again = runs.add(entry, base, "again")
    assert read_manifest(again) == read_manifest(entry)


def test_a_manifest_of_the_first_format_is_read(runs: Runs) -> None:
    base = bert(runs.tmp / "base")
    model = tuned(base, runs.tmp / "w")
    task = labelled(runs.tmp / "task", texts(), says(model, make_tokenizer()))
    entry = Path(shutil.copytree(runs.add(runs.tmp / "w", base, "n"), runs.tmp / "old"))
    content = json.loads((entry / "manifest.json").read_text())
    del content["config"], content["tokenizer"]
    (entry / "manifest.json").write_text(json.dumps({**content, "format": 1}))
    (entry / "manifest.sha256").unlink()
    assert score(entry, base, task) == 1
    (entry / "manifest.json").write_text(json.dumps({**content, "format": 3}))
    with pytest.raises(Exception, match="format 3, this version reads 1 and 2"):
        read_manifest(entry)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("config", {"hidden_act": []}, "config"),
        ("config", {"hidden_size": "wide"}, "config"),
        ("config", {"attn_implementation": "someone/kernel"}, "attn_implementation"),
        ("config", {"model_type": "roberta"}, "model_type"),
        ("config", {"num_attention_heads": 7}, "config"),
        ("config", {"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, expected 2"),
        ("config", ["hidden_act"], "broken manifest: config"),
        ("tokenizer", {"digest": "0", "files": ["../tokenizer.json"]}, "is not understood"),
        ("tokenizer", {"digest": "0", "files": [7]}, "broken manifest: tokenizer.files.0"),
        ("settings", {"seed": 20, "max_length": 2}, "broken manifest: settings.max_length"),
    ],
)
def test_a_damaged_record_is_one_line(runs: Runs, field: str, value: Any, said: str) -> None:
    base = bert(runs.tmp / "base")
    model = tuned(base, runs.tmp / "w")
    task = labelled(runs.tmp / "task", texts(), says(model, make_tokenizer()))
    entry = Path(shutil.copytree(runs.add(runs.tmp / "w", base, "n"), runs.tmp / "damaged"))
    (entry / "manifest.sha256").unlink()
    content = json.loads((entry / "manifest.json").read_text())
    (entry / "manifest.json").write_text(json.dumps({**content, field: value}))
    for verb in (["evaluate", "--task", task], ["apply", "--out", runs.tmp / "never"]):
        assert said in runs.refused(verb[0], "--weights", entry, "--base", base, *verb[1:])


def test_no_file_out_of_the_directory_is_a_tokenizer_s(runs: Runs) -> None:
    base, cased = cased_base(runs.tmp / "base")
    tuned(base, runs.tmp / "w")
    cased.save_pretrained(runs.tmp / "w")
    entry = Path(shutil.copytree(runs.add(runs.tmp / "w", base, "n"), runs.tmp / "copy"))
    (entry / "manifest.sha256").unlink()
    content = json.loads((entry / "manifest.json").read_text())
    for name in ("../tokenizer.json", "/etc/hostname", "deeper/tokenizer.json", "manifest.json"):
        tokenizer = {**content["tokenizer"], "files": [name]}
        files = {file: content["files"][file] for file in ("delta.safetensors", "head.safetensors")} | {name: "0"}
        (entry / "manifest.json").write_text(json.dumps({**content, "tokenizer": tokenizer, "files": files}))
        message = runs.refused("apply", "--weights", entry, "--base", base, "--out", runs.tmp / "never")
        assert "tokenizer.files has" in message


@pytest.mark.parametrize(("kind", "how"), [("full", "--merged"), ("lora", "--merged"), ("lora", "--peft")])
def test_an_export_is_what_its_config_makes(runs: Runs, monkeypatch: pytest.MonkeyPatch, kind: str, how: str) -> None:
    """A directory that would not open gets no name."""
    base = bert(runs.tmp / "base")
    (tuned if kind == "full" else lora)(base, runs.tmp / "w")
    runs.add(runs.tmp / "w", base, "n")
    from recyclable.recipes import apply as applying
    from recyclable.weights.files import CheckpointWriter

    close, write_adapter = CheckpointWriter.close, applying.write_adapter

    def without_head(folder: Path) -> None:
        for file in folder.glob("*model*.safetensors"):
            kept = {name: tensor for name, tensor in load_file(file).items() if "classifier.weight" not in name}
            save_file(kept, file, metadata={"format": "pt"})

    def closed(self: Any) -> None:
        close(self)
        without_head(self._folder)

    def written(carried: Any, differences: Any, into: Path, *rest: Any) -> None:
        write_adapter(carried, differences, into, *rest)
        without_head(into)

    if how == "--merged":
        monkeypatch.setattr(CheckpointWriter, "close", closed)
    else:
        monkeypatch.setattr(applying, "write_adapter", written)
    exported = ("store", "export", "n", how, "--base", base, "--out", runs.tmp / "never")
    applied = ("apply", "--weights", "n", "--base", base, "--out", runs.tmp / "never")
    for argv in [exported] if (kind, how) == ("lora", "--merged") else [exported, applied]:
        assert "classifier.weight is missing" in runs.refused(*argv)
