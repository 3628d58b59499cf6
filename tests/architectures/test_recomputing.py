"""Layers that compute again: the same from less that is kept, or one line of refusal."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from decoders import decoder, decoder_config
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import AlbertConfig, AlbertForMaskedLM, BertConfig, BertForMaskedLM

from recyclable.architectures.recomputing import is_recomputed, recompute_layers
from recyclable.errors import InputError

IDS = torch.arange(4, 28).view(2, 12)
SMALL = {"vocab_size": 40, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
LAYERS = 3


def bert() -> nn.Module:
    torch.manual_seed(1)
    return BertForMaskedLM(BertConfig(**SMALL, num_hidden_layers=LAYERS)).train()  # its dropout is on


def family(name: str) -> Any:
    return lambda: decoder(decoder_config(name)).train()


def lora() -> nn.Module:
    torch.manual_seed(1)
    return get_peft_model(bert(), LoraConfig(r=2, target_modules=["query", "value"], lora_dropout=0.2)).train()


def loss_and_gradients(model: nn.Module) -> tuple[float, dict[str, torch.Tensor]]:
    torch.manual_seed(2)
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("on_host", [False, True])
@pytest.mark.parametrize(
    "make",
    [bert, lora, *map(family, ("llama", "gemma3_text", "gpt2", "gpt_neox", "opt", "mixtral", "t5", "bart"))],
    ids=["bert", "lora", "llama", "gemma3", "gpt2", "neox", "opt", "mixtral", "t5", "bart"],
)
def test_loss_and_gradients_are_the_same_whatever_is_dropped(make: Any, on_host: bool) -> None:
    wanted = loss_and_gradients(make())
    model = make()
    recompute_layers(model, on_host)
    found = loss_and_gradients(model)
    assert found[0] == wanted[0] and found[1].keys() == wanted[1].keys()
    # what comes together at a layer's input may be added up in another order; another dropout is far from this
    for name, gradient in wanted[1].items():
        assert (found[1][name] - gradient).abs().max() <= 1e-5 * gradient.abs().max(), name


def kept(model: nn.Module) -> int:
    """Bytes that a forward pass leaves for the backward pass, weights apart."""
    own, seen = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        loss = model(input_ids=IDS, labels=IDS).loss
    assert loss.requires_grad
    return sum(seen.values())


def test_far_less_is_kept_in_training_and_evaluation_is_as_before() -> None:
    plain, again = bert(), bert()
    recompute_layers(again)
    assert kept(again) < 0.5 * kept(plain)
    assert kept(again.eval()) == kept(plain.eval())


def test_only_layers_inputs_go_to_host_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model, sent = bert(), []

    class Spy(saved_tensors_hooks):
        def __init__(self, pin_memory: bool) -> None:
            super().__init__(lambda tensor: sent.append(tuple(tensor.shape)) or tensor, lambda tensor: tensor)

    monkeypatch.setattr("recyclable.architectures.recomputing.save_on_cpu", Spy)
    recompute_layers(model, on_host=True)
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert sent == [(2, 12, SMALL["hidden_size"])] * LAYERS


def test_whoever_asks_knows_whether_its_layer_computes_again() -> None:
    model, told = bert(), []
    recompute_layers(model)
    model.bert.encoder.layer[1].output.dense.register_forward_hook(lambda *_: told.append(is_recomputed()))
    model.cls.register_forward_hook(lambda *_: told.append(is_recomputed()))
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert told[:2] == [True, False] and not is_recomputed()


def test_a_family_without_it_and_a_prefix_that_it_would_drop_are_refused_in_one_line() -> None:
    albert = AlbertForMaskedLM(AlbertConfig(**SMALL, embedding_size=8, num_hidden_layers=1))
    prefix = get_peft_model(family("llama")(), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    for model, said in ((albert, "AlbertForMaskedLM"), (prefix, "prefix")):
        with pytest.raises(InputError, match=rf"^gradient_checkpointing: is on, but .*{said}") as caught:
            recompute_layers(model)
        assert "\n" not in str(caught.value)
