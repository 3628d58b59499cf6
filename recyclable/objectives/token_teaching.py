"""A teacher's loss on a batch that any training loop has, for models whose answers are text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from recyclable.data.examples import Batch
from recyclable.errors import InputError
from recyclable.kernels import LossSettings, TaughtLogits, loss_of_logits
from recyclable.objectives.token_distillation import TokenTeacher
from recyclable.objectives.token_states import Compared

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def with_positions(batch: Mapping[str, torch.Tensor], model: PreTrainedModel) -> Batch:
    """The batch with `positions` and `targets` of the tokens to be told, as `objectives.token_states` has them.

    Args:
        batch: those of ours, which have them; or transformers': `labels` [B, L] beside what they label (-100 for none),
            of an encoder-decoder the decoder's [B, Ld]. A decoder without labels tells every token of its texts.
        model: says how decoders' inputs are made of labels.

    Raises InputError for an encoder-decoder without labels.
    """
    given = {name: tensor for name, tensor in batch.items() if name != "labels"}
    if "positions" in batch:
        return given
    labels = batch.get("labels")
    if model.config.is_encoder_decoder:
        if labels is None:
            raise InputError("batch", "has no labels, expected those of the decoder [B, L], -100 for none")
        if "decoder_input_ids" not in given:
            given["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels=labels)
        told = labels != -100
    else:
        if labels is None:
            ids, real = given["input_ids"], given.get("attention_mask")
            labels = ids if real is None else ids.masked_fill(real == 0, -100)
        labels = labels.roll(-1, 1)  # a decoder's state tells the token behind it
        told = (labels != -100) & (torch.arange(labels.shape[1], device=labels.device) < labels.shape[1] - 1)
    return {**given, "positions": told.flatten().nonzero().squeeze(1), "targets": labels[told]}


def token_teacher_loss(
    outputs: Any, teacher: TokenTeacher, batch: Batch, temperature: float, beta: float
) -> torch.Tensor:
    """T^2 KL(teacher/T || student/T), mean over told tokens, + beta patient, mean over rows; with student's gradient.

    Args:
        outputs: what the student said of the batch: logits [B, L, V], and hidden states where beta > 0.
        batch: with `positions` [M] (`with_positions`).
    """
    decoder = batch.get("decoder_input_ids", batch["input_ids"])
    logits = outputs.logits[:, outputs.logits.shape[1] - decoder.shape[1] :]  # an adapter's prompts may stand before
    if logits.shape[:2] != decoder.shape:
        raise InputError("model", f"says {list(outputs.logits.shape)} of {list(decoder.shape)} tokens")
    teacher.compared = Compared(first=False) if beta else None
    told = teacher.signals(batch)
    with torch.no_grad():
        taught = TaughtLogits(teacher.head.logits(told.hidden).float())
    settings = LossSettings(temperature=temperature, hard_weight=0.0)
    student = logits.flatten(0, 1)[batch["positions"]].float()
    loss = loss_of_logits(student, taught, None, settings).loss / max(1, len(student))
    if teacher.compared is None:
        return loss
    hidden = getattr(outputs, "decoder_hidden_states", None) or getattr(outputs, "hidden_states", None)
    if hidden is None:
        raise InputError("outputs", "has no hidden_states, which beta > 0 compares with the teacher's")
    states = teacher.compared.states(tuple(each[:, each.shape[1] - decoder.shape[1] :] for each in hidden), batch)
    assert told.states is not None, "a teacher asked for states tells them"
    if states.shape != told.states.shape:
        problem = f"has hidden states {list(states.shape)}, the teacher {list(told.states.shape)}: beta must be 0"
        raise InputError("model", problem)
    patient = teacher.compared.patient_sum(states, told.states, batch)
    return loss + beta * patient / max(1, teacher.compared.count(batch))
