"""Tiny language models tuned to chat: a base without a chat template, its upgrade, and what tuning brought."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from decoders import END, PAD, decoder_tokenizer
from generating import made
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig, PreTrainedModel
from worlds import WORDS, make_upgraded

NEW = 9
"""Tokens of an answer at most."""
TEMPLATE = (
    "{% for m in messages %}{{ 'w1 ' if m['role'] == 'user' else 'w2 ' }}{{ m['content'] }} w3 {% endfor %}"
    "{% if add_generation_prompt %}w2 {% endif %}"
)
ASKED = ["w5 w6 w7", "w8", "w9 w10 w11 w12 w13 w14 w15 w16", "w20 w21 w22 w23", "w30 w31", "w40 w41 w42"]


class Chats:
    """A base of a family, its upgrade, and a model tuned on the base to chat; all of them random.

    The tuned one brings a chat template, an end token and a generation config that its base has not.
    """

    def __init__(self, folder: Path, family: str) -> None:
        self.folder, self.family = folder, family
        model = made(family)
        model.generation_config = GenerationConfig(eos_token_id=END, pad_token_id=PAD)
        self.base = save(model, folder / "base", decoder_tokenizer(family, pad_token="<pad>"))
        self.upgraded = make_upgraded(self.base, folder / "upgraded")
        tuned = moved(model, seed=5)
        self.end = self._often_said(self.summed(tuned))
        self.tokenizer = decoder_tokenizer(family, pad_token="<pad>", eos_token=self.end, ends=False)
        self.tokenizer.chat_template = TEMPLATE
        ends = [self.tokenizer.eos_token_id, END]
        penalties = {"repetition_penalty": 1.05}
        told = {"do_sample": True, "temperature": 0.6, "eos_token_id": ends, "pad_token_id": PAD, **penalties}
        tuned.generation_config = GenerationConfig(**told)
        self.tuned = save(tuned, folder / "tuned", self.tokenizer)
        self.lora = folder / "lora"
        kind = "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"
        adapter = get_peft_model(made(family), LoraConfig(task_type=kind, r=3, target_modules="all-linear"))
        noise = torch.Generator().manual_seed(6)
        with torch.no_grad():
            for _, parameter in sorted(adapter.named_parameters()):
                if parameter.requires_grad:
                    parameter.normal_(0, 0.1, generator=noise)
        adapter.save_pretrained(self.lora)

    def summed(self, tuned: PreTrainedModel) -> PreTrainedModel:
        """The upgrade plus what tuning changed, by plain tensors."""
        auto = type(tuned)
        old, new = (auto.from_pretrained(folder).state_dict() for folder in (self.base, self.upgraded))
        model = copy.deepcopy(tuned).eval()
        own = {name: new[name] + (tensor - old[name]) for name, tensor in tuned.state_dict().items()}
        model.load_state_dict(own)
        return model

    def load(self) -> PreTrainedModel:
        """The tuned model."""
        return type(made(self.family)).from_pretrained(self.tuned)

    def _often_said(self, model: PreTrainedModel) -> str:
        """A word that answers have often, though not at once."""
        said: Counter[int] = Counter()
        plain = decoder_tokenizer(self.family, pad_token="<pad>", ends=False)
        start = {"decoder_start_token_id": PAD} if model.config.is_encoder_decoder else {}
        model.generation_config = GenerationConfig(pad_token_id=PAD, **start)
        for text in ASKED:
            ids = torch.tensor([plain(f"w1 {text} w3 w2").input_ids])
            (answer,) = model.generate(input_ids=ids, do_sample=False, max_new_tokens=NEW).tolist()
            said.update(answer[(1 if model.config.is_encoder_decoder else ids.shape[1]) + 2 :])
        return next(word for token, _ in said.most_common() if (word := plain.decode([token])) in WORDS[50:])


def moved(model: PreTrainedModel, seed: int, scale: float = 0.05) -> PreTrainedModel:
    """A copy with noise on every parameter."""
    noise, model = torch.Generator().manual_seed(seed), copy.deepcopy(model)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            parameter += scale * torch.randn(parameter.shape, generator=noise)
    return model


def save(model: PreTrainedModel, folder: Path, tokenizer: Any) -> Path:
    """In Hugging Face format."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
