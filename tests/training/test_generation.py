"""Batched generation gives what plain transformers and peft give of one prompt after the other; draws are as told."""

from __future__ import annotations

from collections import Counter
from typing import Any

import families
import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from recyclable.training.generation import Decoding, generate
from recyclable.training.sampling import GumbelNoise

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14, 15, 16, 17], [3, 4], [20, 21, 22, 23, 24], [30, 31], [7, 7]]
NEW = 9
MORE: dict[str, dict[str, Any]] = {
    "gemma3_text": families._SIZES["gemma2"] | {"layer_types": ["sliding_attention", "full_attention"]},
    "opt": families._SIZES["opt"] | {"word_embed_proj_dim": 16},  # PEFT's prompts are as wide as the layers
    "t5": families._SIZES["t5"] | {"d_kv": 8},  # and its prefixes together
    "bart": {"vocab_size": 40, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 24}
    | {"decoder_ffn_dim": 24, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "init_std": 0.3}
    | {"max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    | {"decoder_start_token_id": 1, "forced_eos_token_id": None},
}
FAMILIES = ("gpt2", "llama", "gemma3_text", "qwen3", "opt", "gpt_neox", "t5", "bart")


def made(family: str, seed: int = 0) -> PreTrainedModel:
    """A model in evaluation whose answers depend on all of their prompts."""
    config: PretrainedConfig = AutoConfig.for_model(family, **(families._SIZES | MORE)[family])
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model = auto.from_config(config).eval()
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if parameter.dim() > 1:
                parameter.normal_(0, 0.6, generator=noise)
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    return model


def rules(model: PreTrainedModel, **changed: Any) -> GenerationConfig:
    own = GenerationConfig.from_model_config(model.config)
    return GenerationConfig(**own.to_diff_dict() | {"do_sample": False, "num_beams": 1, "pad_token_id": 0} | changed)


def plain(model: Any, prompt: list[int], **keys: Any) -> list[int]:
    """What transformers or peft answer to one prompt, without the end token."""
    begin = 1 if model.config.is_encoder_decoder else len(prompt)
    ids = torch.tensor([prompt])
    keys = {"max_new_tokens": NEW, "do_sample": False, **keys}
    (row,) = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **keys).tolist()
    end = model.generation_config.eos_token_id
    return row[begin : row.index(end, begin) if end in row[begin:] else None]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_answers_are_those_of_one_prompt_after_the_other(family: str) -> None:
    model = made(family)
    expected = [plain(model, prompt) for prompt in PROMPTS]
    for batch_size in (1, 3, 7):
        assert generate(model, PROMPTS, Decoding(NEW), rules(model), batch_size) == expected
    assert len(set(map(tuple, expected))) > 3


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_answers_end_before_any_of_the_end_tokens(family: str) -> None:
    model = made(family)
    model.generation_config.eos_token_id = None
    whole = [plain(model, prompt) for prompt in PROMPTS]
    ends = {whole[0][2], whole[1][4], whole[2][0]}
    expected = [row[: next((i for i, token in enumerate(row) if token in ends), None)] for row in whole]
    assert generate(model, PROMPTS, Decoding(NEW), rules(model, eos_token_id=list(ends)), 4) == expected
    assert not expected[2] and any(len(row) == NEW for row in whole)


def test_a_base_that_asks_for_sampling_or_beams_is_greedy_all_the_same() -> None:
    model = made("gpt2")
    expected = [plain(model, prompt) for prompt in PROMPTS]
    own = GenerationConfig(do_sample=True, num_beams=4, temperature=5.0, top_k=9, penalty_alpha=0.6, eos_token_id=2)
    model.generation_config = own
    assert generate(model, PROMPTS, Decoding(NEW), rules(model), 3) == expected
    assert model.generation_config is own


@pytest.mark.parametrize("family", ["gpt2", "bart"])
def test_penalties_that_a_base_asks_for_take_no_notice_of_padding(family: str) -> None:
    model, penalties = made(family), {"repetition_penalty": 1.6, "no_repeat_ngram_size": 2, "min_length": 8}
    expected = [plain(model, prompt, pad_token_id=0, **penalties) for prompt in PROMPTS]
    assert generate(model, PROMPTS, Decoding(NEW), rules(model, **penalties), 4) == expected
    assert expected != [plain(model, prompt) for prompt in PROMPTS]


ADAPTERS = {
    "lora": lambda kind: LoraConfig(task_type=kind, target_modules="all-linear", init_lora_weights=False),
    "prompts": lambda kind: PromptTuningConfig(task_type=kind, num_virtual_tokens=3),
    "prefix": lambda kind: PrefixTuningConfig(task_type=kind, num_virtual_tokens=3),
}


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3_text", "opt", "t5", "bart"])
def test_adapters_answer_as_plain_peft_does(family: str, adapter: str) -> None:
    base = made(family)
    bare = [plain(base, prompt) for prompt in PROMPTS]
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = get_peft_model(
            base, ADAPTERS[adapter]("SEQ_2_SEQ_LM" if base.config.is_encoder_decoder else "CAUSAL_LM")
        )
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.data.normal_(0, 0.6)
    expected = [plain(model.eval(), prompt) for prompt in PROMPTS]
    for batch_size in (1, 4):
        assert generate(model, PROMPTS, Decoding(NEW), rules(base), batch_size) == expected
    assert expected != bare


def test_drawn_answers_depend_on_seed_and_prompt_alone() -> None:
    model = made("llama")
    drawn = Decoding(NEW, do_sample=True, temperature=1.5, top_k=12, top_p=0.9, seed=3)
    answers = [generate(model, PROMPTS, drawn, rules(model), batch_size) for batch_size in (1, 2, 7)]
    assert answers[0] == answers[1] == answers[2]
    other = generate(model, PROMPTS, Decoding(NEW, do_sample=True, temperature=1.5, seed=4), rules(model), 7)
    assert other != answers[0] and len(set(map(tuple, answers[0]))) == len(PROMPTS)


def test_equal_prompts_are_drawn_other_answers() -> None:
    model = made("llama")
    answers = generate(model, [PROMPTS[0]] * 8, Decoding(NEW, do_sample=True, temperature=2.0), rules(model), 3)
    assert len(set(map(tuple, answers))) > 4


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (6, 1.0), (0, 0.8)])
def test_tokens_are_drawn_with_the_probabilities_that_are_left(top_k: int, top_p: float) -> None:
    """Chi-square of one drawn token against the softmax of the model's own logits, worked out by hand."""
    model, count, temperature = made("gpt2"), 4000, 3.0
    drawn = Decoding(1, do_sample=True, temperature=temperature, top_k=top_k, top_p=top_p, seed=11)
    answers = generate(model, [PROMPTS[0]] * count, drawn, rules(model, eos_token_id=None), 500)
    with torch.no_grad():
        logits = model(torch.tensor([PROMPTS[0]])).logits[0, -1].double() / temperature
    likely = logits.softmax(-1).tolist()
    ranked = sorted(range(len(likely)), key=likely.__getitem__, reverse=True)
    before = {token: sum(likely[other] for other in ranked[:place]) for place, token in enumerate(ranked)}
    left = [token for token in ranked[: top_k or None] if before[token] < top_p]
    found = Counter(answer[0] for answer in answers)
    assert set(found) <= set(left) and len(left) > 4
    expected = {token: count * likely[token] / sum(likely[other] for other in left) for token in left}
    usual = [token for token in left if expected[token] > 5]
    chi_square = sum((found[token] - expected[token]) ** 2 / expected[token] for token in usual)
    degrees = len(usual) - 1
    assert chi_square < degrees + 4 * (2 * degrees) ** 0.5


def test_noise_is_gumbels_and_one_step_or_prompt_tells_nothing_of_the_next() -> None:
    zeros, noise = torch.zeros(2, 50_000), GumbelNoise([0, 1], seed=5)
    first, second = noise(torch.zeros(2, 1), zeros), noise(torch.zeros(2, 2), zeros)
    assert first.dtype == torch.float64 and first.isfinite().all()
    values = torch.cat([first, second])
    assert values.mean().item() == pytest.approx(0.5772, abs=0.01)  # Euler's constant
    assert values.var().item() == pytest.approx(torch.pi**2 / 6, abs=0.03)
    assert (torch.corrcoef(values) - torch.eye(4)).abs().max() < 0.02
    shifted = torch.corrcoef(torch.stack([first[0, :-1], first[0, 1:]]))
    assert abs(shifted[0, 1]) < 0.02


def test_an_impossible_token_stays_impossible() -> None:
    scores = torch.tensor([[-torch.inf, 0.0, -torch.inf]])
    assert GumbelNoise([0], seed=0)(torch.zeros(1, 1), scores).argmax() == 1
