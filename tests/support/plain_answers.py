"""The oracle of tests that train on answers in text: models, rows, losses and scores in plain transformers and PEFT."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from decoders import END, PAD
from peft import LoraConfig, PeftModel, get_peft_model
from plain import ALPHA, BATCH, SEED, SHARE, TEMPERATURE, plain_training, short
from torch import nn
from torch.func import functional_call
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from recyclable.data.order import Order
from recyclable.tunings import TUNINGS

STEPS, WARMUP, RATE, BETA, POINTS = 4, 2, 2e-3, 0.5, (0.4,)
LORA_RATE = 5e-3
"""At four times as much a T5 as random as these is another one in fp64 than in fp32."""
LORA = {"lora_r": 4, "lora_alpha": 16, "target_modules": "all-linear"}
CUT = 400
"""The tokens that texts are cut at, where they are that long."""
Batch = dict[str, torch.Tensor]


class Expected(NamedTuple):
    """What the oracle computed."""

    losses: list[float]
    likelihood: float
    """Mean over all tokens of test, of the better one on dev: the model before training, or after it; NaN without."""
    weights: dict[str, torch.Tensor]
    """That model's trained values, by names without the prefix of the model."""


def task_type(family: str) -> str:
    return "SEQ_2_SEQ_LM" if family == "t5" else "CAUSAL_LM"


def plain_model(family: str, folder: Path) -> nn.Module:
    auto = AutoModelForSeq2SeqLM if family == "t5" else AutoModelForCausalLM
    return auto.from_pretrained(folder, dtype=torch.float32).eval()


def with_difference(family: str, folder: Path, base: str) -> nn.Module:
    """A base with tuned - base added."""
    model, tuned, old = (plain_model(family, folder / name) for name in (base, "tuned", "base"))
    with torch.no_grad():
        for parameter, after, before in zip(model.parameters(), tuned.parameters(), old.parameters(), strict=True):
            parameter += after - before
    return model


def with_tuned_lora(family: str, folder: Path, base: str) -> nn.Module:
    """A base with the adapter that was tuned."""
    return PeftModel.from_pretrained(plain_model(family, folder / base), folder / "tuned_lora", is_trainable=True)


def with_fresh_lora(family: str, folder: Path, base: str) -> nn.Module:
    """A base with the adapter that the package draws from the seed."""
    config = LoraConfig(task_type=task_type(family), r=4, lora_alpha=16, target_modules="all-linear")
    model = get_peft_model(plain_model(family, folder / base), config)
    drawn = TUNINGS.get("lora")(**LORA).attach(plain_model(family, folder / base), task_type(family), SEED)
    model.load_state_dict(drawn.state_dict())
    return model


def rows_of(task: Path, split: str) -> list[dict[str, str]]:
    """Prompts and responses; of options the right one, behind which no end token follows."""
    rows = [json.loads(line) for line in (task / f"{split}.jsonl").read_text().splitlines()]
    return [row if "response" in row else {**row, "response": row["choices"][row["answer"]]} for row in rows]


def plain_batch(family: str, folder: Path, rows: list[dict[str, str]]) -> Batch:
    """Inputs and labels [B, L], -100 where nothing is to be told."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    texts, labels, decoded = [], [], []
    for row in rows:
        prompt, answer = (tokenizer(row[name])["input_ids"] for name in ("prompt", "response"))
        if family == "t5":  # both end in </s>
            texts.append(prompt)
            labels.append(answer)
            decoded.append([PAD, *answer[:-1]])
        else:
            answer = answer if "choices" in row else [*answer, END]
            texts.append([*prompt, *answer][:CUT])
            labels.append(([-100] * len(prompt) + answer)[:CUT])

    def padded(lists: list[list[int]], filler: int) -> torch.Tensor:
        return nn.utils.rnn.pad_sequence([torch.tensor(one) for one in lists], batch_first=True, padding_value=filler)

    batch = {"input_ids": padded(texts, PAD), "labels": padded(labels, -100)}
    batch["attention_mask"] = padded([[1] * len(text) for text in texts], 0)
    return {**batch, **({"decoder_input_ids": padded(decoded, PAD)} if decoded else {})}


def told(model: nn.Module, batch: Batch, weights: dict[str, torch.Tensor] | None = None) -> Any:
    """Logits of the tokens that predict, and each row's states there."""
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    given = {**inputs, "output_hidden_states": True, "use_cache": False}
    output = model(**given) if weights is None else functional_call(model, weights, kwargs=given)
    seq2seq = "decoder_input_ids" in batch
    where = (batch["labels"] if seq2seq else batch["labels"].roll(-1, 1)) != -100
    states = torch.stack((output.decoder_hidden_states if seq2seq else output.hidden_states)[:-1], dim=2)
    return output.logits[where], [states[row, where[row]] for row in range(len(where)) if where[row].any()]


def hard(answered: Any, batch: Batch) -> torch.Tensor:
    return nn.functional.cross_entropy(answered[0], batch["labels"][batch["labels"] != -100])


def taught(student: Any, teacher: Any) -> torch.Tensor:
    (ours, own_states), (theirs, states) = student, teacher
    p = (theirs / TEMPERATURE).softmax(-1)
    kl = (p * (p.log() - (ours / TEMPERATURE).log_softmax(-1))).sum(-1).mean()
    patient = torch.stack([0.5 * nn.functional.mse_loss(a, b) for a, b in zip(own_states, states, strict=True)]).mean()
    return ALPHA * TEMPERATURE**2 * kl + BETA * patient


def expected_of(family: str, folder: Path, task: Path, what: str, batch_size: int = BATCH) -> Expected:
    """What a method, or `tune`, comes to; `lora_METHOD` and `tune_lora` train an adapter."""
    lora, method = "lora" in what, what.removeprefix("lora_")
    outdated = with_tuned_lora if lora else with_difference
    start = with_fresh_lora if what == "tune_lora" else outdated
    fresh = method in ("scratch", "distill", "tune")
    student = plain_model(family, folder / "new") if fresh else start(family, folder, "new")
    trained = [name for name, _ in student.named_parameters() if not lora or "lora_" in name]
    teacher = outdated(family, folder, "base").requires_grad_(False).eval() if method in SOFT else None
    rows, own = rows_of(task, "train"), dict(student.named_parameters())
    order = Order(len(rows), batch_size, SEED)

    def loss_of(step: int) -> torch.Tensor:
        batch = plain_batch(family, folder, [rows[index] for _, index in order.step(step)])
        answered = told(student, batch)
        if teacher is None:
            return hard(answered, batch)
        return SOFT[method](hard(answered, batch), answered, batch, student, teacher)

    @torch.no_grad()
    def now() -> tuple[float, float, dict[str, torch.Tensor]]:
        scores = {"test": math.nan}
        for split in (name for name in ("dev", "test") if (task / f"{name}.jsonl").is_file()):
            batch = plain_batch(family, folder, rows_of(task, split))
            scores[split] = -hard(told(student, batch), batch).item()
        return scores["dev"], scores["test"], short({name: own[name] for name in trained})

    student.eval()
    before = now()
    losses = plain_training(student, trained, loss_of, LORA_RATE if lora else RATE, WARMUP, STEPS)
    return Expected(losses, *max(before, now(), key=lambda found: found[0])[1:])


def mixed_loss(task: torch.Tensor, answered: Any, batch: Batch, student: nn.Module, teacher: nn.Module) -> torch.Tensor:
    """That of `distill` and `both`."""
    with torch.no_grad():
        says = told(teacher, batch)
    return (1 - ALPHA) * task + taught(answered, says)


def interpolated_loss(
    task: torch.Tensor, answered: Any, batch: Batch, student: nn.Module, teacher: nn.Module
) -> torch.Tensor:
    """That of `interpolate`."""
    with torch.no_grad():
        says = told(teacher, batch)
    soft, fixed = taught(answered, says), dict(teacher.named_parameters())
    for x in POINTS:
        mixed = {name: x * value + (1 - x) * fixed[name] for name, value in student.named_parameters()}
        soft = soft + taught(told(student, batch, mixed), says)
    return SHARE * task + (1 - SHARE) * soft


SOFT: dict[str, Callable[..., torch.Tensor]] = {
    "distill": mixed_loss,
    "both": mixed_loss,
    "interpolate": interpolated_loss,
}
"""Methods with a teacher -> their losses."""
