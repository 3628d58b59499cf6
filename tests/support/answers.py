"""A small task answered in text, and how likely plain transformers or peft find its answers, one text at a time."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from decoders import END
from torch.nn import functional as F
from worlds import WORDS

ROWS = {"train": 40, "dev": 8, "test": 4}


def make_answers_task(folder: Path, rows: Mapping[str, int] = ROWS) -> Path:
    """Prompts of one to nine words, answered with the words after each of the first ones: one to five of them."""
    folder.mkdir()
    draw = random.Random(3)
    for name, size in rows.items():
        made = []
        for _ in range(size):
            words = [draw.randrange(60) for _ in range(draw.randint(1, 9))]
            said = [WORDS[word + 1] for word in words[: draw.randint(1, 5)]]
            made.append({"prompt": " ".join(WORDS[word] for word in words), "response": " " + " ".join(said)})
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    return folder


def rows_of(file: Path) -> list[dict[str, str]]:
    """Of a JSON lines file."""
    return [json.loads(line) for line in file.read_text().splitlines()]


def log_likelihood(model: Any, tokenizer: Any, rows: Iterable[Mapping[str, str]]) -> float:
    """A decoder's, mean over all tokens of the responses and of their ends."""
    losses = []
    for row in rows:
        prompt, answer = (tokenizer(row[name])["input_ids"] for name in ("prompt", "response"))
        ids = torch.tensor([[*prompt, *answer, END]])
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
        told = ids[0, len(prompt) :]
        losses.append(F.cross_entropy(logits[-1 - len(told) : -1], told, reduction="none"))  # prompts may stand before
    return -torch.cat(losses).mean().item()
