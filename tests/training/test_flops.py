"""Model FLOPs of a step against torch's own counter over a plain forward and backward pass, head on few tokens."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AlbertConfig,
    AlbertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from recyclable.objectives.labelled import LabelledTask
from recyclable.objectives.token_distillation import TokenDistillation, TokenTeacher
from recyclable.objectives.token_loss import TokenLoss
from recyclable.tasks import KINDS
from recyclable.training.flops import Work, model_flops

ROWS, LENGTH, TOLD, VOCABULARY = 3, 32, 10, 90
WORK = Work(ROWS, ROWS * LENGTH, TOLD)
SIZE = {
    **{"vocab_size": VOCABULARY, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4},
    **{"intermediate_size": 40, "max_position_embeddings": 80, "attn_implementation": "eager"},
}


def roberta(**more: int) -> PreTrainedModel:
    return RobertaForMaskedLM(RobertaConfig(**SIZE, **more))


def albert() -> PreTrainedModel:
    return AlbertForMaskedLM(AlbertConfig(**SIZE, embedding_size=16))


def llama() -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**SIZE, num_key_value_heads=2, head_dim=8))


def gpt2() -> PreTrainedModel:
    size = {"n_embd": 24, "n_layer": 3, "n_head": 4, "n_positions": 80, "vocab_size": VOCABULARY}
    return GPT2LMHeadModel(GPT2Config(**size, attn_implementation="eager"))


def mixtral() -> PreTrainedModel:
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 2}
    return MixtralForCausalLM(MixtralConfig(**SIZE, **experts, experts_implementation="eager"))


def ids(length: int = LENGTH) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (ROWS, length), generator=torch.Generator().manual_seed(0))


def spread(model: PreTrainedModel, **told: torch.Tensor) -> torch.Tensor:
    """Logits of the first so many tokens, the head computed nowhere else."""
    states = model.base_model(**told, use_cache=False).last_hidden_state.flatten(0, 1)[:TOLD]
    return next(head for name in ("lm_head", "predictions") if (head := getattr(model, name, None)))(states)


def counted(work: Callable[[], torch.Tensor]) -> int:
    """FLOP of a forward and a backward pass, as torch counts them."""
    with FlopCounterMode(display=False) as counter:
        work().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("made", [roberta, albert, llama, gpt2, mixtral])
def test_a_step_has_as_many_as_torch_counts_with_the_head_where_the_loss_looks(made: Callable[[], PreTrainedModel]):
    model, targets = made().train(), torch.zeros(TOLD, dtype=torch.long)
    found = model_flops(TokenLoss(copy.deepcopy(model))).of(WORK)
    # rotary angles and a router are products too, small ones
    wanted = counted(lambda: F.cross_entropy(spread(model, input_ids=ids()), targets))
    assert found == pytest.approx(wanted, rel=0.01 if made in (llama, mixtral) else 1e-9)


def test_an_encoder_decoder_reads_one_text_and_writes_another():
    size = {"d_model": 24, "d_kv": 6, "d_ff": 40, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 4}
    model = T5ForConditionalGeneration(T5Config(**size, vocab_size=VOCABULARY, decoder_start_token_id=0))
    wanted = counted(lambda: model(input_ids=ids(), labels=ids(8)).loss)
    assert model_flops(TokenLoss(model)).of(Work(ROWS, ROWS * LENGTH, ROWS * 8)) == pytest.approx(wanted)


def test_a_teacher_goes_forward_only():
    student, teacher = roberta(), roberta()
    both = TokenDistillation(student, TokenTeacher(teacher, None), alpha=0.5, beta=0.0, temperature=1.0)
    alone = model_flops(TokenLoss(copy.deepcopy(student))).of(WORK)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        spread(teacher, input_ids=ids())
    assert model_flops(both).of(WORK) == alone + counter.get_total_flops()


def test_frozen_weights_let_gradients_pass_and_have_none():
    model = get_peft_model(roberta(), LoraConfig(r=2, target_modules=["query", "value"]))
    found = model_flops(TokenLoss(model)).of(WORK)
    wanted = counted(lambda: spread(model.get_base_model(), input_ids=ids()).sum())
    # in the first layer nothing is passed on to frozen embeddings: by its projections, two of them adapted, and by keys
    projections, adapted, keys = 3 * 24 * 24 * WORK.tokens, 2 * 24 * 2 * WORK.tokens, 24 * ROWS * LENGTH**2
    assert found == wanted + 2 * (projections + adapted + keys)


def test_a_head_alone_has_the_model_before_it_go_forward_only():
    model = roberta()
    model.base_model.requires_grad_(False)
    model.lm_head.decoder.weight = torch.nn.Parameter(model.lm_head.decoder.weight.detach().clone())
    wanted = counted(lambda: spread(model, input_ids=ids()).sum())
    states = 2 * 24 * 24 * WORK.told  # the gradient that the head's first matrix would pass on
    assert model_flops(TokenLoss(model)).of(WORK) == wanted + states


def test_a_classifier_looks_at_one_token_of_a_text():
    model = RobertaForSequenceClassification(RobertaConfig(**SIZE, num_labels=3))
    objective = LabelledTask(model, KINDS.get("classification", "problem")())
    wanted = counted(lambda: model(input_ids=ids()).logits.sum())
    assert model_flops(objective).of(Work(ROWS, ROWS * LENGTH, ROWS)) == wanted


def test_the_work_of_windows_and_of_many_steps():
    model = LlamaForCausalLM(LlamaConfig(**SIZE))
    full = model_flops(TokenLoss(model))
    assert full.of(Work(*(5 * each for each in WORK))) == pytest.approx(5 * full.of(WORK))
    model.config.sliding_window = LENGTH // 4
    pairs = 12 * 3 * 24 * ROWS * LENGTH**2
    assert full.of(WORK) - model_flops(TokenLoss(model)).of(WORK) == pytest.approx(0.75 * pairs)
