"""Small worlds made in a moment: a base, its upgrade, weights tuned on it, a task and a corpus, for tests that train.

Everything is drawn from seeds. The language has 195 words `w0` ... `w194`, a word is a token, ids 0 to 4 are special.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
)

from recyclable.carrying.places import adapter_shapes
from recyclable.models.tasks import task_model
from recyclable.tasks.parts.task import load_task
from recyclable.tunings import TUNINGS
from recyclable.tunings.parts.tuning import Tuning
from recyclable.weights import lineage
from recyclable.weights.adapted import write_manifest
from recyclable.weights.base import Base
from recyclable.weights.fingerprint import fingerprint
from recyclable.weights.manifest import ADAPTER, DELTA, HEAD, Manifest

SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = [f"w{i}" for i in range(195)]
LABELS = ("left", "middle", "right")


class Chain:
    """A base, its upgrade and a task, made in a folder: what the worlds of tests start from."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.base = make_base(folder / "base")
        self.upgraded = make_upgraded(self.base, folder / "upgraded")
        self.task = make_task(folder / "task")


def make_tokenizer(
    words: list[str] = WORDS, kind: type[PreTrainedTokenizerFast] = PreTrainedTokenizerFast, *, bert: bool = True
) -> PreTrainedTokenizerFast:
    """A word-level tokenizer: ids 0 to 4 are the special tokens, then the words in order.

    Args:
        bert: in the manner of BERT's, else one that adds nothing to the text.
    """
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate([*SPECIALS, *words])}, unk_token="[UNK]"))
    backend.pre_tokenizer = Whitespace()
    if not bert:
        return kind(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]")
    backend.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return kind(
        tokenizer_object=backend,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def make_base(
    folder: Path, *, hidden: int = 32, layers: int = 2, mlm_head: bool = True, tied: bool = True, seed: int = 1
) -> Path:
    """A BERT of `layers` x `hidden` with random weights and its tokenizer, in Hugging Face format; returns `folder`.

    Args:
        mlm_head: with a masked-LM head and no pooler, else with a pooler and no head.
        tied: the head's output weights are the token embeddings.
    """
    config = BertConfig(
        vocab_size=len(SPECIALS) + len(WORDS),
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=2 * hidden,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        initializer_range=0.1,  # at BERT's own 0.02 so narrow a model says the same of every text
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = (BertForMaskedLM if mlm_head else BertModel)(config)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return Path(folder)


def make_roberta(folder: Path, *, hidden: int = 32, layers: int = 2, seed: int = 1) -> Path:
    """A RoBERTa with a masked-LM head: no token types, no pooler, positions from the padding token's index on."""
    config = RobertaConfig(
        vocab_size=len(SPECIALS) + len(WORDS),
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=2 * hidden,
        max_position_embeddings=64,
        type_vocab_size=1,
        pad_token_id=0,
        initializer_range=0.1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = RobertaForMaskedLM(config)
    model.save_pretrained(folder)
    tokenizer = make_tokenizer()
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    tokenizer.save_pretrained(folder)
    return Path(folder)


def make_model(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast | None = None) -> Path:
    """A base of any other family, of `make_tokenizer`'s 200 tokens or another tokenizer's."""
    model.save_pretrained(folder)
    (tokenizer or make_tokenizer()).save_pretrained(folder)
    return Path(folder)


def make_upgraded(base: Path, folder: Path, *, scale: float = 0.02, seed: int = 2) -> Path:
    """`base` with noise N(0, scale) on every tensor and a lineage that names `base`: an upgrade without training."""
    shutil.copytree(base, folder)
    noise = torch.Generator().manual_seed(seed)
    tensors = load_file(folder / "model.safetensors")
    tensors = {name: t + scale * torch.randn(t.shape, generator=noise) for name, t in sorted(tensors.items())}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    record = {
        "format": 1,
        "fingerprint": fingerprint(Base(folder)).as_dict(),
        "ancestors": lineage.ancestors_for_child(base, str(base), fingerprint(Base(base)).as_dict()),
    }
    (folder / lineage.FILE).write_text(json.dumps(record))
    return Path(folder)


def make_outdated(base: Path, task: Path, folder: Path, *, scale: float = 0.02, seed: int = 3) -> Path:
    """Adapted weights of `base` for `task` without training: noise N(0, scale) as delta, a random pooler and head."""
    opened, labelled = Base(base), load_task(task)
    noise, hidden = torch.Generator().manual_seed(seed), opened.config.hidden_size
    delta = {name: scale * torch.randn(opened.shape(name), generator=noise) for name in opened.names}
    head = {
        "classifier.bias": torch.zeros(len(labelled.labels)),
        "classifier.weight": torch.randn(len(labelled.labels), hidden, generator=noise) * 0.2,
        "pooler.dense.bias": torch.zeros(hidden),
        "pooler.dense.weight": torch.randn(hidden, hidden, generator=noise) * 0.2,
    }
    folder.mkdir(parents=True)
    save_file(delta, folder / DELTA, metadata={"format": "pt"})
    save_file(head, folder / HEAD, metadata={"format": "pt"})
    _write_manifest(folder, base, task, {"tuning": "full"})
    return folder


def make_adapter(base: Path, task: Path, folder: Path, kind: str, *, seed: int = 6) -> Path:
    """An adapter of `base` for `task` without training: every tensor random. kind: lora or bottleneck, of size 3."""
    tuning = small_adapter(kind)
    model = tuning.attach(task_model(Base(base), load_task(task), 20), "SEQ_CLS", 20)
    noise = torch.Generator().manual_seed(seed)
    shapes = dict(sorted(adapter_shapes(model).items()))
    model.peft_config["default"].save_pretrained(folder)
    save_file({name: torch.randn(shape, generator=noise) * 0.2 for name, shape in shapes.items()}, folder / ADAPTER)
    _write_manifest(folder, base, task, tuning.model_dump())
    return folder


def small_adapter(kind: str) -> Tuning:
    """The tuning that `make_adapter` means by this kind."""
    return TUNINGS.get(kind)(**{"lora": {"lora_r": 3}, "bottleneck": {"bottleneck_size": 3}}[kind])


def _write_manifest(folder: Path, base: Path, task: Path, tuning: dict[str, Any]) -> None:
    labelled = load_task(task)
    manifest = Manifest(
        kind="delta" if tuning["tuning"] == "full" else "adapter",
        tuning=tuning,
        task=labelled.described(),
        base={"name": str(base), "fingerprint": fingerprint(Base(base)).as_dict()},
        method="tune",
        metrics={"metric": "accuracy", "dev": {}, "test": {}, "best_step": 0, "examples": 0, "seconds": 0.0},
        history=[{"step": 0, "examples": 0, "seconds": 0.0}],
        settings={"seed": 20, "max_length": 24},
    )
    write_manifest(folder, manifest)


def make_task(folder: Path, *, train: int = 90, dev: int = 30, test: int = 30, seed: int = 4) -> Path:
    """A directory with train, dev and test.jsonl: which of three groups of words most of a text comes from.

    Texts have 3 to 20 words, so batches differ in length; labels are left, middle, right in turn. Twenty steps are
    enough to learn much of it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(seed)
    for name, size in (("train", train), ("dev", dev), ("test", test)):
        rows = []
        for i in range(size):
            own = WORDS[i % 3 * 8 : i % 3 * 8 + 8]
            text = [draw.choice(own if draw.random() < 0.8 else WORDS) for _ in range(draw.randint(3, 20))]
            rows.append({"text": " ".join(text), "label": LABELS[i % 3]})
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def make_labels_task(folder: Path, *, train: int = 90, dev: int = 30, test: int = 30, seed: int = 5) -> Path:
    """A directory with train, dev and test.jsonl: which of three groups of words a text has some of, perhaps of none.

    `label` is the list of their names, left, middle, right; texts have 1 to 21 words.
    """
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(seed)
    for name, size in (("train", train), ("dev", dev), ("test", test)):
        rows = []
        for _ in range(size):
            has = [i for i in range(3) if draw.random() < 0.4]
            text = [WORDS[24 + draw.randrange(100)] for _ in range(draw.randint(1, 3))]
            text += [WORDS[8 * i + draw.randrange(4)] for i in has for _ in range(6)]
            rows.append({"text": " ".join(draw.sample(text, len(text))), "label": [LABELS[i] for i in has]})
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def make_tagged_task(
    folder: Path,
    *,
    types: tuple[str, ...] = ("PER", "LOC"),
    train: int = 90,
    dev: int = 30,
    test: int = 30,
    seed: int = 7,
) -> Path:
    """A directory with train, dev and test.conll: entities of one to three words, each type from words of its own.

    Sentences have 3 to 22 words. One word in ten is a compound such as `w3-w9`, of three pieces and of the first
    part's type.
    """
    folder.mkdir(parents=True, exist_ok=True)
    draw, common = random.Random(seed), WORDS[8 * len(types) :]
    for name, size in (("train", train), ("dev", dev), ("test", test)):
        lines = ["-DOCSTART- O\n"]
        for _ in range(size):
            length, lines = draw.randint(3, 20), [*lines, ""]
            while length > 0:
                kind = draw.choice([None, None, *range(len(types))])
                own = common if kind is None else WORDS[8 * kind : 8 * kind + 8]
                for place in range(draw.randint(1, 3)):
                    word = draw.choice(own) + (f"-{draw.choice(WORDS)}" if draw.random() < 0.1 else "")
                    tag = "O" if kind is None else f"{'I' if place else 'B'}-{types[kind]}"
                    lines.append(f"{word} {tag}")
                    length -= 1
        (folder / f"{name}.conll").write_text("\n".join(lines) + "\n")
    return folder


def make_corpus(folder: Path, *, documents: int = 100, seed: int = 5) -> Path:
    """A directory with train.txt, a document of 20 to 60 words per line, of 24 words; one says much about the next."""
    folder.mkdir(parents=True, exist_ok=True)
    draw, lines = random.Random(seed), []
    for _ in range(documents):
        word, line = draw.randrange(24), []
        for _ in range(draw.randint(20, 60)):
            line.append(WORDS[word])
            word = (3 * word + draw.randint(1, 2)) % 24
        lines.append(" ".join(line))
    (folder / "train.txt").write_text("\n".join(lines) + "\n")
    return folder


def rewrite_rows(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change every row of a task's directory, or of one file, in place."""
    for file in folder.glob("*.jsonl") if folder.is_dir() else [folder]:
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        for row in rows:
            change(row)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_config(path: Path, settings: dict[str, Any]) -> Path:
    """A run config with these settings; paths become strings, and what is None is left out. Returns `path`."""
    kept = {name: value for name, value in settings.items() if value is not None}
    path.write_text(yaml.safe_dump(json.loads(json.dumps(kept, default=str))))
    return path
