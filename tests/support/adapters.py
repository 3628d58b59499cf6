"""Adapters as plain peft makes and saves them on a small base, every trained number random; and what they say."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from peft import LNTuningConfig, LoraConfig, PeftConfig, PeftModel, TaskType, TrainableTokensConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, PreTrainedModel
from worlds import LABELS, SPECIALS, WORDS, make_tokenizer

from recyclable.recipes.importing import import_weights
from recyclable.recipes.lineage import declare
from recyclable.recipes.tuned_elsewhere import Told
from recyclable.tasks.parts.task import load_task

HEAD = ["classifier", "pooler"]
TRAINED = [6, 25, 38, 9]
"""Rows of w1, w20, w33 and w4."""


def lora(**settings: Any) -> LoraConfig:
    """A small LoRA with its head."""
    given = {"target_modules": ["query", "value"], "modules_to_save": HEAD, **settings}
    return LoraConfig(task_type=TaskType.SEQ_CLS, r=4, lora_alpha=12, **given)


def full_value_kinds() -> dict[str, PeftConfig]:
    """Kinds whose file holds values of the base's own tensors, or of its embeddings."""
    embedding = {"target_modules": ["query", "word_embeddings"]}
    return {
        "bias-all": lora(bias="all"),
        "bias-lora": lora(bias="lora_only"),
        "norms": LNTuningConfig(task_type=TaskType.SEQ_CLS, target_modules=["LayerNorm"], modules_to_save=HEAD),
        "rows": TrainableTokensConfig(
            task_type=TaskType.SEQ_CLS, token_indices=TRAINED, target_modules=["word_embeddings"]
        ),
        "rows-beside": lora(trainable_token_indices={"word_embeddings": TRAINED}),
        "rows-listed": lora(trainable_token_indices=TRAINED),
        "rows-of-two": lora(trainable_token_indices={"word_embeddings": TRAINED, "position_embeddings": TRAINED}),
        "words": lora(modules_to_save=[*HEAD, "word_embeddings"], bias="all"),
        "words-lora": lora(**embedding),
        "words-dora": lora(use_dora=True, **embedding),
    }


def plain(base: Path) -> PreTrainedModel:
    """The base with a head for three labels, the same at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(9)
        return AutoModelForSequenceClassification.from_pretrained(base, num_labels=len(LABELS)).eval()


def make_peft(base: Path, config: PeftConfig, folder: Path, scale: float = 0.3) -> Path:
    """What plain peft saves of an adapter that was trained; returns `folder`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = get_peft_model(plain(base), config)
    trained(model, scale).save_pretrained(folder)
    return folder


def trained(model: PeftModel, scale: float = 0.3) -> PeftModel:
    """The model with noise N(0, scale) on everything that is trained, as if it had been."""
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in (parameter for parameter in model.parameters() if parameter.requires_grad):
            parameter += scale * torch.randn(parameter.shape, generator=noise)
    return model.eval()


def taken_in(folder: Path, base: Path, task: Path | None, into: Path) -> Path:
    """Another tool's directory as adapted weights, without a task those of a language model; returns `into`."""
    into.mkdir(parents=True)
    told = Told(labels=LABELS if task else None)
    import_weights(folder, str(base), into, name="t", codec=None, task=load_task(task) if task else None, told=told)
    return into


def rearranged(base: Path, folder: Path, words: list[str], parent: Path, seed: int = 8) -> Path:
    """`base` with these words in this order in its vocabulary, new ones' rows random; declared as `parent`'s child."""
    old = {word: row for row, word in enumerate([*SPECIALS, *WORDS])}
    shutil.copytree(base, folder)
    make_tokenizer(words).save_pretrained(folder)
    tensors, draw = load_file(folder / "model.safetensors"), torch.Generator().manual_seed(seed)
    for name in [n for n, tensor in tensors.items() if len(tensor) == len(old)]:
        fresh = 0.1 * torch.randn(len(SPECIALS) + len(words), *tensors[name].shape[1:], generator=draw)
        for row, word in enumerate([*SPECIALS, *words]):
            if word in old:
                fresh[row] = tensors[name][old[word]]
        tensors[name] = fresh
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = folder / "config.json"
    config.write_text(config.read_text().replace(f'"vocab_size": {len(old)}', f'"vocab_size": {len(fresh)}'))
    (folder / "lineage.json").unlink(missing_ok=True)
    declare(str(folder), str(parent))
    return folder


def ids_of(words: list[list[str]], order: list[str] = WORDS) -> torch.Tensor:
    """The texts' ids [texts, words + 2] in a vocabulary with the words in this order."""
    row = {word: number for number, word in enumerate([*SPECIALS, *order])}
    return torch.tensor([[2, *(row[word] for word in text), 3] for text in words])


def answers(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Logits [texts, labels]."""
    with torch.no_grad():
        return model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


def peft_answers(base: Path, folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """What plain peft says with the adapter in a directory."""
    return answers(PeftModel.from_pretrained(plain(base), folder), ids)
