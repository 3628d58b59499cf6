"""Causal LMs of several families, tiny and random, and a batch of prompts with responses for them."""

from __future__ import annotations

import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

VOCABULARY = 40
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 32,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def gpt2() -> PreTrainedModel:
    rates = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=32, initializer_range=0.3, **rates
        )
    )


def llama(tied: bool = False) -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=tied))


def gemma2() -> PreTrainedModel:
    return Gemma2ForCausalLM(Gemma2Config(**SHAPE, final_logit_softcapping=2.0, query_pre_attn_scalar=8))


def responses() -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Three prompts of unequal length with responses, the last without any; and labels [B, L] as transformers has them.

    Predicted are the tokens of the response alone, each from the token before it.
    """
    prompts, answers = [[1, 5, 6, 7], [1, 9], [1, 11, 12, 13, 14]], [[20, 21, 2], [22, 23, 24, 25, 2], []]
    rows = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    length = max(map(len, rows))
    ids, mask = torch.zeros(3, length, dtype=torch.long), torch.zeros(3, length, dtype=torch.long)
    labels, positions = torch.full((3, length), -100), []
    for row, (prompt, tokens) in enumerate(zip(prompts, rows, strict=True)):
        ids[row, : len(tokens)], mask[row, : len(tokens)] = torch.tensor(tokens), 1
        labels[row, len(prompt) : len(tokens)] = torch.tensor(tokens[len(prompt) :], dtype=torch.long)
        positions += [row * length + place - 1 for place in range(len(prompt), len(tokens))]
    targets = torch.tensor([token for answer in answers for token in answer])
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "positions": torch.tensor(positions),
        "targets": targets,
    }, labels
