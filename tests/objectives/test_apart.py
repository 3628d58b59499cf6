"""Packed documents give the loss and the gradients of separate ones, in every family, or packing is refused."""

from __future__ import annotations

import inspect

import pytest
import torch
from language_models import FAMILIES, SPANS, TOKENS, tiny
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from recyclable.architectures.heads import language_head
from recyclable.errors import InputError
from recyclable.lm.parts.apart import prove
from recyclable.objectives.apart import Apart, apart, in_documents, separate
from recyclable.objectives.token_loss import TokenLoss
from recyclable.objectives.token_states import token_states, without_cache

LENGTH, TOLD = 26, 14
REFUSED = {"bloom", "deberta", "bart"}
"""ALiBi by a mask of two dimensions, attention with windows of its own, positions that nothing tells the encoder."""
ONE_MACHINE = {"zero_optimization": {"stage": 0}}


def row(family: str, seed: int = 0) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    sides = {"input_ids": LENGTH, **({"decoder_input_ids": TOLD} if FAMILIES[family][0] is SPANS else {})}
    return {name: torch.randint(20, TOKENS, (1, length), generator=draw) for name, length in sides.items()}


def model_of(family: str, attention: str):
    torch.manual_seed(0)
    try:
        return tiny(family, attention)
    except ValueError as error:
        assert "does not support an attention implementation" in str(error)
        pytest.skip(f"transformers has no {attention} for {family}")


def chosen(model, family: str) -> tuple[Apart | None, dict[str, str]]:
    body = language_head(model).body

    def ask(inputs):
        told = body(**inputs, **without_cache(body))
        return told["last_hidden_state" if "last_hidden_state" in told else "logits"]

    return apart(ask, body, model.config, row(family), causal(family))


def causal(family: str) -> bool:
    return FAMILIES[family][0].__name__ == "AutoModelForCausalLM"


def packed_batch(family: str) -> dict[str, torch.Tensor]:
    """Three rows of unequal documents, of an encoder-decoder the last ones padded on both sides."""
    draw = torch.Generator().manual_seed(3)
    rows = [row(family, seed) for seed in (1, 2, 3)]
    batch = {name: torch.cat([one[name] for one in rows]) for name in rows[0]}
    sizes = {"": [[3, 20, 3], [1, 12, 13], [26, 0, 0]]}
    if FAMILIES[family][0] is SPANS:
        sizes = {"": [[3, 20, 3], [1, 10, 11], [9, 0, 0]], "decoder_": [[2, 9, 3], [1, 5, 5], [6, 0, 0]]}
    for name in list(batch):
        side = name.removesuffix("input_ids")
        documents = torch.full_like(batch[name], -1)
        for number, counts in enumerate(sizes[side]):
            documents[number, : sum(counts)] = torch.arange(3).repeat_interleave(torch.tensor(counts))
        batch[f"{side}documents"] = documents
        batch[f"{side}attention_mask"] = (documents >= 0).long()
    told = batch.get("decoder_documents", batch["documents"])
    batch["positions"] = (told >= 0).flatten().nonzero().squeeze(1)
    batch["targets"] = torch.randint(20, TOKENS, batch["positions"].shape, generator=draw)
    return batch


def loss_of_separate(model, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """By plain transformers, document by document."""
    cache = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    side = "decoder_" if "decoder_documents" in batch else ""
    targets = torch.full(batch[f"{side}documents"].shape, -100)
    targets.view(-1)[batch["positions"]] = batch["targets"]
    total = torch.zeros(())
    for number in range(len(batch["input_ids"])):
        documents = batch[f"{side}documents"][number]
        for document in documents[documents >= 0].unique():
            inputs = {"input_ids": batch["input_ids"][number][batch["documents"][number] == document][None]}
            if side:
                inputs["decoder_input_ids"] = batch["decoder_input_ids"][number][documents == document][None]
            logits = model(**inputs, **cache).logits[0]
            total = total + F.cross_entropy(logits, targets[number][documents == document], reduction="sum")
    return total


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_documents_cost_what_separate_ones_do_or_are_refused(family: str, attention: str) -> None:
    model = model_of(family, attention)
    if family in REFUSED:
        with pytest.raises(InputError, match=r"attention: is 'documents', but nothing keeps .* apart in here \(.*full"):
            prove(model, row(family), causal(family), ONE_MACHINE, "here")
        return
    found = prove(model, row(family), causal(family), ONE_MACHINE, "here")
    batch = packed_batch(family)
    objective = TokenLoss(model, inputs=found.inputs(model))
    count = objective.counts(batch)["task"]
    packed = objective(batch)["task"] / count
    packed.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    wanted = loss_of_separate(model, batch) / count
    wanted.backward()
    assert packed.item() == pytest.approx(wanted.item(), abs=1e-5)
    found_there = {name for name, p in model.named_parameters() if p.grad is not None}
    assert gradients.keys() == found_there
    for name, gradient in gradients.items():
        own = model.get_parameter(name).grad
        assert torch.allclose(gradient, own, rtol=0, atol=1e-5 * max(1.0, own.abs().max())), name
    together = TokenLoss(model)(batch)["task"] / count
    assert together.item() != pytest.approx(wanted.item(), abs=1e-3), "documents would not have mattered"


@pytest.mark.parametrize(("family", "length", "window"), [("mistral", 26, 4), ("gemma3", 26, 16), ("gemma3", 26, 99)])
def test_a_trial_s_longest_document_is_longer_than_a_window_that_the_row_has_room_for(family, length, window) -> None:
    documents = in_documents(row(family), window)["documents"][0]
    sizes = documents.bincount().tolist()
    assert len(sizes) == 3 and sum(sizes) == length and min(sizes) >= 2
    assert max(sizes) > window or window > length - 6


@pytest.mark.parametrize("window", [LENGTH - 1, LENGTH - 4])
def test_a_window_little_shorter_than_the_row_is_not_forgotten(window: int) -> None:
    _, _, sizes = FAMILIES["llama"]
    config = AutoConfig.for_model("gpt_oss", **sizes, num_local_experts=2, num_experts_per_tok=1, sliding_window=window)
    torch.manual_seed(0)
    model, text = AutoModelForCausalLM.from_config(config).eval(), row("llama")
    found, _ = chosen(model, "llama")
    assert found is not None
    told = found.inputs(model)({**text, "documents": torch.zeros_like(text["input_ids"])})
    with torch.no_grad():
        packed, alone = (model(**inputs, use_cache=False).logits for inputs in (told, text))
    assert torch.allclose(packed, alone, rtol=0, atol=1e-5 * alone.abs().max())


def test_the_documents_of_a_trial_are_what_was_cut_apart() -> None:
    trial = in_documents(row("t5"), None)
    rows = separate(trial)
    for name in ("input_ids", "decoder_input_ids"):
        assert torch.equal(torch.cat([one[name] for one in rows], dim=1), trial[name])
        assert all(one[name].shape == one[name.replace("input_ids", "attention_mask")].shape for one in rows)


def test_what_a_mask_is_added_in_is_the_model_s_own_precision() -> None:
    model = tiny("opt").to(torch.bfloat16)
    found = chosen(tiny("opt"), "opt")[0]
    inputs = found.inputs(model)(packed_batch("opt"))
    assert inputs["attention_mask"].dtype == torch.bfloat16 and inputs["attention_mask"].isfinite().all()
    hidden = token_states(language_head(model), packed_batch("opt"), inputs=found.inputs(model)).hidden
    assert hidden.isfinite().all()
