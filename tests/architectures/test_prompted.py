"""Trained prompts and prefixes before a text: states and logits without the head are those of PEFT's own forward."""

from __future__ import annotations

import pytest
import torch
from decoders import PAD, SEQ2SEQ, decoder, decoder_config

from recyclable.architectures.heads import language_head
from recyclable.objectives.token_loss import TokenLoss
from recyclable.tunings import TUNINGS

FAMILIES = ["gpt2", "opt", "gpt_neox", "llama", "mistral", "qwen3", "gemma2", "gemma3_text", "t5", "bart"]
DRAW = torch.Generator().manual_seed(3)
IDS, ANSWERS = (torch.randint(4, 200, (3, length), generator=DRAW) for length in (9, 5))
MASK = (torch.arange(9) < torch.tensor([9, 6, 4])[:, None]).long()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tuning", ["prompt", "prefix"])
def test_the_loss_of_chosen_tokens_is_that_of_pefts_own_logits(family: str, tuning: str) -> None:
    two = family in SEQ2SEQ
    base = decoder(decoder_config(family, pad_token_id=PAD))
    kind = "SEQ_2_SEQ_LM" if two else "CAUSAL_LM"
    model = TUNINGS.get(tuning)(num_virtual_tokens=3).attach(base, kind, 7).eval()
    with torch.no_grad():
        for parameter in model.prompt_encoder.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    inputs = {"input_ids": IDS, "attention_mask": MASK, **({"decoder_input_ids": ANSWERS} if two else {})}
    read = ANSWERS if two else IDS
    places = [(0, 1), (0, 4), (1, 2), (2, 3)]
    positions = torch.tensor([row * read.shape[1] + place for row, place in places])
    targets = torch.tensor([5, 17, 100, 33])
    logits = model(**inputs).logits[:, -read.shape[1] :]
    wanted = torch.stack([logits[place] for place in places]).log_softmax(-1)[torch.arange(4), targets].neg().sum()
    loss = TokenLoss(model).sums({**inputs, "positions": positions, "targets": targets})["task"]
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-5)
    bare = language_head(base).body(**inputs)["last_hidden_state"]
    states = language_head(model).body(**inputs, output_hidden_states=True)
    assert not torch.allclose(states["last_hidden_state"], bare, atol=1e-3), "the prompts do something"
    assert {tuple(layer.shape) for layer in states["hidden_states"]} == {tuple(bare.shape)}
    ours, theirs = (
        torch.autograd.grad(each, list(model.prompt_encoder.parameters()), retain_graph=True)[0]
        for each in (loss, wanted)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
