"""A last layer that computes where it is read alone: loss and gradients are transformers' own, of whole sequences."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import config, drawn
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.pytorch_utils import Conv1D

from recyclable.adapters.bottleneck import BottleneckConfig
from recyclable.architectures.heads import language_head
from recyclable.architectures.last_layer import narrow
from recyclable.architectures.layers import layer_lists
from recyclable.architectures.llama import LLAMA
from recyclable.architectures.read_tokens import read_tokens
from recyclable.architectures.recomputing import recompute_layers
from recyclable.objectives.labelled import LabelledTask
from recyclable.objectives.task_outputs import task_outputs
from recyclable.objectives.token_loss import TokenLoss
from recyclable.objectives.token_states import Compared, token_states
from recyclable.tasks.classification import Classification

_SIZE: dict[str, Any] = {
    **{"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24},
    **{"max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
_GROUPED = {**_SIZE, "num_key_value_heads": 1, "head_dim": 6, "sliding_window": 4}
_EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
KNOWN = {
    **{name: config(name) for name in ("bert", "distilbert", "electra", "modernbert")},
    "roberta": config("roberta", type_vocab_size=1),
    **{
        name: AutoConfig.for_model(name, **_SIZE)
        for name in ("ernie", "megatron-bert", "xlm-roberta-xl", "roberta-prelayernorm", "data2vec-text", "camembert")
    },
    **{name: config(name) for name in ("gpt2", "gpt_neox")},
    "serial gpt_neox": config("gpt_neox", use_parallel_residual=False),
    **{
        name: AutoConfig.for_model(name, **_GROUPED, **(_EXPERTS if "moe" in name or name == "mixtral" else {}))
        for name in LLAMA.model_types
    },
    "phi3": AutoConfig.for_model("phi3", **_SIZE),
}
WHOLE = {name: config(name) for name in ("albert", "deberta-v2", "opt", "cohere")}
"""Families that nobody has told how: they compute everywhere, as ever."""
LENGTH = 10
READ = torch.tensor([0, 3, 4, 9, 21, 34, 35])
"""Tokens of four rows, as many as there are of them in each: 4, 0, 1, 2."""


def batch(positions: torch.Tensor = READ) -> dict[str, torch.Tensor]:
    """Rows of unequal length, filled up."""
    drawn = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 40, (4, LENGTH), generator=drawn)
    mask = (torch.arange(LENGTH) < torch.tensor([10, 7, 9, 10])[:, None]).long()
    targets = torch.randint(3, 40, (len(positions),), generator=drawn)
    return {"input_ids": ids * mask, "attention_mask": mask, "positions": positions, "targets": targets}


def model_of(made: Any) -> Any:
    masked = type(made) in AutoModelForMaskedLM._model_mapping
    made._experts_implementation = "eager"  # their products of groups are of fp32 alone
    return drawn(made, AutoModelForMaskedLM if masked else AutoModelForCausalLM).double()


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def require_same_gradients(found: nn.Module, model: nn.Module) -> None:
    one, other = gradients(found), gradients(model)
    assert one.keys() == other.keys()
    largest = max(gradient.abs().max() for gradient in other.values())
    for name, gradient in other.items():  # some are 0 but for rounding: a softmax does not feel a bias of its keys
        assert (one[name] - gradient).abs().max() <= 1e-6 * max(gradient.abs().max(), 1e-3 * largest), name


def require_same(found: nn.Module, model: nn.Module, data: dict[str, torch.Tensor]) -> list[int]:
    """Compare our loss and its gradients with those of transformers' logits; tell how many tokens the last layer's last
    linear module was given each time."""
    seen: list[int] = []
    (stack,) = layer_lists(found).values()
    *_, last = (module for module in stack[-1].modules() if isinstance(module, nn.Linear | Conv1D))
    watch = last.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[:-1].numel()))
    loss = TokenLoss(found)(data)["task"]
    loss.backward()
    watch.remove()
    told = model(input_ids=data["input_ids"], attention_mask=data["attention_mask"])
    logits = told.logits[:, -LENGTH:].flatten(0, 1)[data["positions"]]
    wanted = F.cross_entropy(logits, data["targets"], reduction="sum")
    wanted.backward()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-6)
    require_same_gradients(found, model)
    return seen


@pytest.mark.parametrize("family", KNOWN)
def test_loss_and_gradients_are_those_of_whole_sequences(family: str) -> None:
    model = model_of(KNOWN[family])
    seen = require_same(copy.deepcopy(model), model, batch())
    assert seen == [len(READ)]


@pytest.mark.parametrize("family", WHOLE)
def test_a_family_that_nobody_has_described_computes_everywhere(family: str) -> None:
    model = model_of(WHOLE[family])
    assert set(require_same(copy.deepcopy(model), model, batch())) == {4 * LENGTH}


@pytest.mark.parametrize("rows", [torch.arange(0), torch.arange(LENGTH, 2 * LENGTH), torch.arange(0, 4 * LENGTH, 2)])
def test_however_many_tokens_are_read_and_in_however_few_rows(rows: torch.Tensor) -> None:
    model = model_of(KNOWN["bert"])
    assert require_same(copy.deepcopy(model), model, batch(rows)) == [len(rows)]


def test_where_most_tokens_are_read_all_are_computed() -> None:
    model = model_of(KNOWN["llama"])
    assert require_same(copy.deepcopy(model), model, batch(torch.arange(3 * LENGTH))) == [4 * LENGTH]


ADAPTERS = {
    "lora": lambda: LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False),
    "bottleneck": lambda: BottleneckConfig(bottleneck_size=3, init_weights=False),
    "prompt": lambda: PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "prefix": lambda: PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_adapters_and_prompts_are_in_the_way_of_nothing(family: str, kind: str) -> None:
    torch.manual_seed(0)
    model = get_peft_model(model_of(KNOWN[family]), ADAPTERS[kind]()).double()
    seen = require_same(copy.deepcopy(model), model, batch())
    assert seen == [len(READ)]


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_layers_that_compute_again_read_what_they_read_the_first_time(family: str) -> None:
    """Also where another batch comes before the first one's backward pass."""
    once, again = (model_of(KNOWN[family]).train() for _ in range(2))
    rates = [module for model in (once, again) for module in model.modules() if isinstance(module, nn.Dropout)]
    for module in rates:
        module.p = 0.0
    for model in (once, again):
        for module in model.modules():
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.0
    recompute_layers(again)
    found = []
    for model in (once, again):
        objective, batches = TokenLoss(model), [batch(), batch(READ[1:4] + 5)]
        sum(objective(data)["task"] for data in batches).backward()
        found.append(gradients(model))
    for name, gradient in found[0].items():
        assert torch.allclose(found[1][name], gradient, rtol=1e-9, atol=1e-12), name


def test_a_pass_that_gets_no_backward_leaves_nothing_behind_where_layers_compute_again() -> None:
    model, seen = model_of(KNOWN["bert"]).train(), []
    recompute_layers(model)
    objective = TokenLoss(model)
    (stack,) = layer_lists(model).values()
    stack[-1].register_forward_pre_hook(lambda *_: seen.append(weakref.ref(read_tokens())))
    loss = objective(batch())["task"]
    assert seen[0]() is not None
    del loss
    gc.collect()
    assert seen[0]() is None


@pytest.mark.parametrize("family", ["roberta", "gemma2"])
@pytest.mark.parametrize("first", [False, True])
def test_the_layers_states_that_are_compared_are_whole(family: str, first: bool) -> None:
    model = model_of(KNOWN[family])
    bare, data = copy.deepcopy(model), batch()
    told = token_states(language_head(model), data, Compared(first))
    inputs = {name: data[name] for name in ("input_ids", "attention_mask")}
    wanted = bare(**inputs, output_hidden_states=True).hidden_states
    assert torch.allclose(told.states, Compared(first).states(wanted, data), rtol=1e-9)


def test_other_forwards_of_the_same_model_are_as_ever() -> None:
    model, data = model_of(KNOWN["bert"]), batch()
    inputs = {name: data[name] for name in ("input_ids", "attention_mask")}
    before = model(**inputs).logits
    TokenLoss(model)(data)
    TokenLoss(copy.deepcopy(model))(data)  # a copy has hooks already
    assert torch.equal(model(**inputs).logits, before)


FIRST = ("bert", "distilbert", "electra", "roberta", "ernie", "megatron-bert", "xlm-roberta-xl", "roberta-prelayernorm")


def classified(model: nn.Module, data: dict[str, torch.Tensor]) -> tuple[torch.Tensor, list[int]]:
    """Loss of classes by our objective, and how many tokens the last layer's last linear module was given."""
    seen: list[int] = []
    (stack,) = layer_lists(model).values()
    *_, last = (module for module in stack[-1].modules() if isinstance(module, nn.Linear))
    watch = last.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[:-1].numel()))
    objective = LabelledTask(model, Classification())
    loss = objective(data)["task"]
    watch.remove()
    return loss, seen


@pytest.mark.parametrize(
    ("family", "prompted"),
    [*((family, False) for family in (*FIRST, "modernbert", "llama")), ("bert", True), ("roberta", True)],
)
def test_a_classifier_computes_the_token_that_it_reads_where_that_is_the_first(family: str, prompted: bool) -> None:
    torch.manual_seed(0)
    made = copy.deepcopy(KNOWN[family])
    made.num_labels = 3
    model: Any = drawn(made, AutoModelForSequenceClassification).double()
    if prompted:
        model = get_peft_model(model, PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3)).double()
    bare, data = copy.deepcopy(model), batch()
    inputs = {name: data[name] for name in ("input_ids", "attention_mask")}
    labels = torch.tensor([0, 2, 1, 1])
    loss, seen = classified(model, {**inputs, "labels": labels})
    loss.backward()
    wanted = F.cross_entropy(bare(**inputs).logits, labels, reduction="sum")
    wanted.backward()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-6)
    require_same_gradients(model, bare)
    assert seen == [4 if family in FIRST else 4 * (LENGTH + 3 * prompted)]


def test_a_model_that_says_something_of_every_token_computes_them_all() -> None:
    model = drawn(KNOWN["bert"], AutoModelForTokenClassification)
    data = batch()
    with torch.no_grad():
        wanted = model(input_ids=data["input_ids"], attention_mask=data["attention_mask"]).logits
        narrow(model)
        assert torch.equal(task_outputs(model, data).logits, wanted)


def attended(model: nn.Module, ask: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many queries a row had, of each attention in order."""
    found, whole = [], F.scaled_dot_product_attention

    def spy(query: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        found.append(query.shape[2])
        return whole(query, *args, **kwargs)

    with monkeypatch.context() as patched, torch.no_grad():
        patched.setattr(F, "scaled_dot_product_attention", spy)
        ask()
    return found


@pytest.mark.parametrize(
    ("family", "queries"),
    [*((family, 4) for family in ("bert", "distilbert", "roberta", "llama", "gpt2")), ("gpt_neox", 4), ("opt", LENGTH)],
)
def test_the_last_attention_has_as_many_queries_as_are_read_of_any_row(family: str, queries: int, monkeypatch) -> None:
    model = model_of((KNOWN | WHOLE)[family])
    objective = TokenLoss(model)
    assert attended(model, lambda: objective(batch()), monkeypatch) == [LENGTH, queries]
    assert attended(model, lambda: model(input_ids=batch()["input_ids"]), monkeypatch) == [LENGTH, LENGTH]


def test_a_row_of_which_all_is_read_gives_its_length_to_the_attention(monkeypatch) -> None:
    model = model_of(KNOWN["bert"])
    objective, data = TokenLoss(model), batch(torch.arange(LENGTH, 2 * LENGTH))
    assert attended(model, lambda: objective(data), monkeypatch) == [LENGTH, LENGTH]


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])
def test_tokens_are_told_in_any_order(family: str) -> None:
    model = model_of(KNOWN[family])
    require_same(copy.deepcopy(model), model, batch(READ[torch.tensor([5, 0, 6, 2, 4, 1, 3])]))
