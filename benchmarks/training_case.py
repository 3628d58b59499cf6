"""One comparison of training steps: which model, on what machine; its base, its corpus, its batches for the peer."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
LEARNING_RATE, SEED = 1e-4, 20
BATCHES = "batches.pt"
_SHIPPED = {0: "cpu_zero0", 1: "cpu_zero1", 2: "cpu", 3: "cpu_zero3"}
SMOLLM2 = {
    **{"model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30},
    **{"num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49_152, "tie_word_embeddings": True},
    **{"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3},
}
TINY_LLAMA = {**SMOLLM2, "hidden_size": 144, "intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": 5000}


@dataclass(frozen=True)
class Case:
    """One configuration, trained by ours and by the peer on the same batches."""

    model: str
    lm: str
    """Kind of language model: masked, causal."""
    folder: str
    """Holds `base`, a Hugging Face directory with a head, and what is written for this model."""
    corpus: str
    stage: int
    ranks: int
    precision: str
    """fp32, bf16."""
    rows: int
    """Sequences in a step of all ranks."""
    length: int
    each: int
    """Steps of one turn."""
    pairs: int
    """Turns of each side."""
    warm: int = 2
    """Steps that are not measured, two at least: the first ones allocate, and ZeRO-3 learns the order of modules."""

    @property
    def name(self) -> str:
        """For messages and folders."""
        return f"{self.model}-zero{self.stage}-{self.ranks}-{self.precision}"

    @property
    def steps(self) -> int:
        """All that are trained."""
        return self.warm + self.pairs * self.each

    @property
    def tokens(self) -> int:
        """Of a step of all ranks."""
        return self.rows * self.length

    def ds_config(self) -> dict[str, Any]:
        """The shipped one of this stage, in this precision; both sides get it."""
        told = json.loads((ROOT / "ds_configs" / f"{_SHIPPED[self.stage]}.json").read_text())
        told["train_micro_batch_size_per_gpu"] = self.rows // self.ranks
        return told | ({"bf16": {"enabled": True}} if self.precision == "bf16" else {})

    def trainer(self) -> dict[str, Any]:
        """What the peer's arguments say of the machine."""
        config = {**self.ds_config(), "gradient_clipping": 1.0, "gradient_accumulation_steps": 1}
        return {"deepspeed": config, "use_cpu": True, "logging_steps": 1}

    def run(self, out: Path) -> dict[str, Any]:
        """The run config of ours."""
        return {
            **{"lm": self.lm, "base": str(Path(self.folder) / "base"), "out": str(out), "seed": SEED},
            **{"corpus": self.corpus, "max_length": self.length, "max_steps": self.steps},
            "attention": "full",  # the peer knows of no documents
            **{"train_batch_size": self.rows, "learning_rate": LEARNING_RATE, "save_every": 0, "log_every": 1},
            **{"eval_every": self.steps, "eval_batch_size": self.rows, "max_heldout_sequences": 2 * self.rows},
        }


def cores() -> int:
    """That this process may run on."""
    return len(os.sched_getaffinity(0))


def encoder_world(folder: Path, quick: bool) -> tuple[str, str]:
    """Write `base` under the folder, and return its name and a corpus: RECYCLABLE_DATA's, else made ones.

    A base without a head gets one that is drawn, and none drops anything out: both sides have to compute the same.
    """
    from transformers import AutoModelForMaskedLM, AutoTokenizer, set_seed

    from recyclable.architectures.dropout import set_dropout
    from recyclable.data.docstrings import write_docstring_world

    data = os.environ.get("RECYCLABLE_DATA")
    if data and not quick:
        source, corpus, name = Path(data, "models", "minilm_l3"), Path(data, "corpora", "general"), "MiniLM-L3"
        corpus /= "heldout.jsonl.gz"  # real text as well, and soon read
    else:
        made = write_docstring_world(folder / "world", sentences=600 if quick else 3000)
        source, corpus, name = made.base, made.general / "train.jsonl", "BERT 2 x 128, drawn"
    set_seed(SEED)
    model = AutoModelForMaskedLM.from_pretrained(source, trust_remote_code=False)
    set_dropout(model.config, 0.0)
    model.save_pretrained(folder / "base")
    AutoTokenizer.from_pretrained(source, trust_remote_code=False).save_pretrained(folder / "base")
    return name, str(corpus)


def decoder_world(folder: Path, length: int, quick: bool, real: Path | None) -> tuple[str, str]:
    """The same for a decoder: a real one that lies somewhere, else one of its shape with drawn weights."""
    from plan import make_base, make_texts

    if real is not None:
        (folder / "base").symlink_to(real.resolve(), target_is_directory=True)
        return "SmolLM2-135M", encoder_corpus(folder)
    make_base(folder / "base", TINY_LLAMA if quick else SMOLLM2)
    make_texts(folder, length, 64)
    return "Llama 2 x 96, drawn" if quick else "SmolLM2-135M's shape, drawn", str(folder / "corpus.txt")


def encoder_corpus(folder: Path) -> str:
    """Text for a model that brings its tokenizer along."""
    from recyclable.data.docstrings import write_docstring_world

    if data := os.environ.get("RECYCLABLE_DATA"):
        return str(Path(data, "corpora", "general", "heldout.jsonl.gz"))
    return str(write_docstring_world(folder / "world").general / "train.jsonl")


def write_batches(case: Case, folder: Path) -> None:
    """The very batches that ours will train on, as transformers' models take them: `input_ids` and `labels` [N, L].

    Rows of all steps in order; what is not told is -100. `counts`: how many tokens each step tells.
    """
    import torch

    from recyclable.recipes.pretrain_settings import read_pretrain_settings
    from recyclable.recipes.pretrain_text import read_text
    from recyclable.weights.base import Base
    from recyclable.weights.vocabulary import load_tokenizer

    kind = read_pretrain_settings(case.run(folder / "unused"), "benchmark")
    base = Base(Path(case.folder) / "base")
    text = read_text(kind, base, load_tokenizer(base.folder))
    ids, labels, counts = [], [], []
    for step in range(case.steps):
        batch = text.training.batch(text.order.step(step))
        told = torch.full_like(batch["input_ids"], -100).flatten()
        told[batch["positions"] + int(case.lm == "causal")] = batch["targets"]  # transformers shifts them itself
        ids.append(batch["input_ids"])
        labels.append(told.view_as(batch["input_ids"]))
        counts.append(len(batch["targets"]))
    torch.save({"input_ids": torch.cat(ids), "labels": torch.cat(labels), "counts": counts}, folder / BATCHES)
