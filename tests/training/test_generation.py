"""Batched generation gives what plain transformers and peft give of one prompt after the other; draws are as told."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from generating import ADAPTERS, NEW, PROMPTS, adapted, made, plain, rules
from processes import STAGE_3, finish, start
from transformers import GenerationConfig, PreTrainedModel

from recyclable.data.decoding import Decoding
from recyclable.training.generation import Generating, generate
from recyclable.training.sampling import GumbelNoise

GREEDY = Decoding(NEW)
DECODERS = ("gpt2", "llama", "gemma3_text", "qwen3", "opt", "gpt_neox")


def answers(
    model: Any, batch_size: int, decoding: Decoding = GREEDY, prompts: list[list[int]] = PROMPTS
) -> list[list[int]]:
    return generate(Generating(model), prompts, decoding, rules(model), batch_size)


def say(model: PreTrainedModel, folder: Path, **rules: Any) -> None:
    """Make the base's own file say so."""
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, "pad_token_id": 3, **rules}))
    model.config.name_or_path = str(folder)


@pytest.mark.parametrize("family", [*DECODERS, "t5", "bart"])
def test_greedy_answers_are_those_of_one_prompt_after_the_other(family: str) -> None:
    model = made(family)
    expected = [plain(model, prompt) for prompt in PROMPTS]
    for batch_size in (1, 3, 7):
        assert answers(model, batch_size) == expected
    assert len(set(map(tuple, expected))) > 3


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_answers_end_before_any_of_the_end_tokens(family: str, tmp_path: Path) -> None:
    model = made(family)
    model.generation_config.eos_token_id = None
    whole = [plain(model, prompt) for prompt in PROMPTS]
    ends = [whole[0][2], whole[1][4], whole[2][0]]
    say(model, tmp_path, eos_token_id=ends[:2])
    expected = [row[: next((i for i, token in enumerate(row) if token in ends), None)] for row in whole]
    assert generate(Generating(model), PROMPTS, GREEDY, rules(model, end=ends[2]), 4) == expected
    assert not expected[2]


def test_a_base_that_asks_for_sampling_or_beams_is_greedy_all_the_same(tmp_path: Path) -> None:
    model = made("gpt2")
    expected = [plain(model, prompt) for prompt in PROMPTS]
    asks = {
        "do_sample": True,
        "num_beams": 4,
        "temperature": 5.0,
        "top_k": 9,
        "penalty_alpha": 0.6,
        "dola_layers": "low",
    }
    say(model, tmp_path, **asks, num_return_sequences=3, output_scores=True, return_dict_in_generate=True)
    model.generation_config = own = GenerationConfig.from_pretrained(tmp_path)
    assert answers(model, 3) == expected
    assert model.generation_config is own


@pytest.mark.parametrize("family", ["gpt2", "bart"])
def test_penalties_that_a_base_asks_for_take_no_notice_of_padding(family: str, tmp_path: Path) -> None:
    model, penalties = made(family), {"repetition_penalty": 1.6, "no_repeat_ngram_size": 2, "min_length": 8}
    expected = [plain(model, prompt, pad_token_id=3, **penalties) for prompt in PROMPTS]
    bare = [plain(model, prompt) for prompt in PROMPTS]
    say(model, tmp_path, **penalties)
    assert answers(model, 4) == expected != bare


def test_tokens_that_no_file_names_are_the_configs() -> None:
    found = rules(made("t5"))
    assert (found.decoder_start_token_id, found.eos_token_id, found.pad_token_id) == (3, [2], 3)
    model = made("gpt2")
    model.config.eos_token_id = None
    assert (rules(model).eos_token_id, rules(model, end=7).pad_token_id) == (None, 7)


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3_text", "opt", "t5", "bart"])
def test_adapters_answer_as_plain_peft_does(family: str, adapter: str) -> None:
    model, base = adapted(family, adapter), made(family)
    expected = [plain(model, prompt) for prompt in PROMPTS]
    for batch_size in (1, 4):
        assert answers(model, batch_size) == expected
    assert expected != [plain(base, prompt) for prompt in PROMPTS]


def test_drawn_answers_depend_on_seed_and_prompt_alone() -> None:
    model = made("llama")
    drawn = Decoding(NEW, do_sample=True, temperature=1.5, top_k=12, top_p=0.9, seed=3)
    one, two, seven = (answers(model, batch_size, drawn) for batch_size in (1, 2, 7))
    assert one == two == seven and len(set(map(tuple, one))) == len(PROMPTS)
    assert answers(model, 7, Decoding(NEW, do_sample=True, temperature=1.5, top_k=12, top_p=0.9, seed=4)) != one


def test_equal_prompts_are_drawn_other_answers() -> None:
    told = answers(made("llama"), 3, Decoding(NEW, do_sample=True, temperature=2.0), [PROMPTS[0]] * 8)
    assert len(set(map(tuple, told))) > 4


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (6, 1.0), (0, 0.8)])
def test_tokens_are_drawn_with_the_probabilities_that_are_left(top_k: int, top_p: float) -> None:
    """Chi-square of one drawn token against the softmax of the model's own logits, worked out by hand."""
    model, count, temperature = made("gpt2"), 4000, 3.0
    model.config.eos_token_id = None
    drawn = Decoding(1, do_sample=True, temperature=temperature, top_k=top_k, top_p=top_p, seed=11)
    found = Counter(token for (token,) in answers(model, 500, drawn, [PROMPTS[0]] * count))
    with torch.no_grad():
        logits = model(torch.tensor([PROMPTS[0]])).logits[0, -1].double() / temperature
    likely = logits.softmax(-1).tolist()
    ranked = sorted(range(len(likely)), key=likely.__getitem__, reverse=True)
    before = {token: sum(likely[other] for other in ranked[:place]) for place, token in enumerate(ranked)}
    left = [token for token in ranked[: top_k or None] if before[token] < top_p]
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
    neighbours = torch.corrcoef(torch.stack([first[0, :-1], first[0, 1:]]))
    assert abs(neighbours[0, 1]) < 0.02


def test_an_impossible_token_stays_impossible() -> None:
    scores = torch.tensor([[-torch.inf, 0.0, -torch.inf]])
    assert GumbelNoise([0], seed=0)(torch.zeros(1, 1), scores).argmax() == 1


def test_two_ranks_answer_as_one_whole_or_partitioned_whatever_their_prompts(tmp_path: Path) -> None:
    kinds: list[tuple[str, str | None, int]] = [("gpt2", None, 0), ("gpt2", None, 3), ("t5", None, 3)]
    kinds += [("llama", "lora", 0), ("llama", "lora", 3), ("llama", "prompts", 3), ("bart", "prefix", 3)]
    drawn = {"do_sample": True, "temperature": 1.5, "top_k": 12, "top_p": 0.9, "seed": 3}
    runs, expected = [], []
    for family, adapter, stage in kinds:
        model = made(family) if adapter is None else adapted(family, adapter)
        zero = {"stage": stage, **(STAGE_3 if stage else {})}
        runs.append({"family": family, "adapter": adapter, "drawn": drawn, "zero": zero})
        expected.append([answers(model, 7), answers(model, 7, Decoding(NEW, **drawn))])
    process = start(tmp_path, runs, 2, "generation_ranks.py")
    finish(process, tmp_path)
    for rank in (0, 1):
        assert json.loads((tmp_path / f"answers-{rank}.json").read_text()) == expected
