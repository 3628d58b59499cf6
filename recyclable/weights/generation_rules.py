"""What a base's generation_config.json says of every text generated from it: which tokens begin, end and pad it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from transformers import (
    GenerationConfig,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    PretrainedConfig,
    PreTrainedTokenizerBase,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
)

from recyclable.errors import InputError
from recyclable.weights.generation_file import FILE, told_of
from recyclable.weights.vocabulary import row_count

_BEGIN = ("bos_token_id", "decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id")
TOKENS = (*_BEGIN, "eos_token_id", "pad_token_id")
"""The rules that name tokens which begin, end or pad a text."""
_READ_EARLIER_TOKENS = (
    *("repetition_penalty", "no_repeat_ngram_size", "bad_words_ids", "sequence_bias"),
    *("min_length", "encoder_repetition_penalty", "encoder_no_repeat_ngram_size"),
)
_SCORES = (*_READ_EARLIER_TOKENS, "min_new_tokens", "suppress_tokens", "begin_suppress_tokens")
_NO_RULE = (None, 0, 1.0)
_PROCESSORS = {
    "repetition_penalty": RepetitionPenaltyLogitsProcessor,
    "no_repeat_ngram_size": NoRepeatNGramLogitsProcessor,
    "bad_words_ids": NoBadWordsLogitsProcessor,
    "sequence_bias": SequenceBiasLogitsProcessor,
}
"""Where transformers looks at values no sooner than a text is begun."""
SAMPLING = ("temperature", "top_p", "top_k")
"""What a base may propose for sampling."""


def rules_of(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """A base's rules for greedy search, as transformers keeps them: tokens, and penalties on scores.

    Whatever else the file asks for (sampling, beams, another model's help) is left out: the base of a chat model often
    asks for sampling, and greedy is to mean greedy. Generation stops at the file's end tokens, the config's where it
    names none, and at the tokenizer's, which texts are trained to end with.

    Raises InputError for a broken file, or an encoder-decoder that no token is known to begin the answers of.
    """
    told = told_of(config) or {}
    for name in TOKENS:
        _require_ids(config, name, told.get(name))
    rules = {name: told[name] for name in _SCORES if told.get(name) not in _NO_RULE}
    for name in (name for name in _PROCESSORS if name in rules):
        _require_usable(config, name, rules[name])
    own = GenerationConfig.from_model_config(config).to_dict()
    tokens = {name: told[name] if told.get(name) is not None else own.get(name) for name in _BEGIN}
    if config.is_encoder_decoder and tokens["decoder_start_token_id"] is None and tokens["bos_token_id"] is None:
        raise InputError(config.name_or_path, "names no decoder_start_token_id, which answers begin with")
    ends = _listed(told.get("eos_token_id")) or _listed(own.get("eos_token_id"))
    ends = list(dict.fromkeys([*ends, *_listed(tokenizer.eos_token_id)]))
    pads, rows = [told.get("pad_token_id"), own.get("pad_token_id"), *ends], row_count(config.get_text_config())
    pad = next((token for token in pads if token is not None and 0 <= token < (rows or math.inf)), 0)  # some say -1
    greedy = {"do_sample": False, "num_beams": 1, "num_return_sequences": 1, "use_cache": True}
    return GenerationConfig(**tokens, **rules, **greedy, eos_token_id=ends or None, pad_token_id=pad)


def proposed_sampling(config: PretrainedConfig) -> dict[str, float]:
    """`SAMPLING` as far as it is told of a model."""
    return {name: value for name, value in (told_of(config) or {}).items() if name in SAMPLING}


def end_tokens(rules: GenerationConfig) -> list[int]:
    """Those that an answer ends with."""
    return _listed(rules.eos_token_id)


def looks_at_padding(rules: GenerationConfig) -> bool:
    """Whether scores depend on the tokens before, so that a decoder's padded prompts would get other answers."""
    return any(getattr(rules, name, None) not in _NO_RULE for name in _READ_EARLIER_TOKENS)


def _require_ids(config: PretrainedConfig, name: str, told: object) -> None:
    """InputError for what a file says of a token where that is no id, nor a list of them where that may be."""
    ids = told if isinstance(told, list) and name == "eos_token_id" else [told]
    if told is not None and not (ids and all(type(token) is int for token in ids)):
        raise InputError(_place(config), f"{name} is {told!r}, expected a token's id")


def _require_usable(config: PretrainedConfig, name: str, told: Any) -> None:
    """InputError for a penalty that transformers makes nothing of."""
    try:
        _PROCESSORS[name](told)
    except Exception as error:  # whatever it makes of the value
        raise InputError(_place(config), f"{name} is {told!r}, which cannot be used: {error}") from error


def _place(config: PretrainedConfig) -> str | Path:
    return Path(config.name_or_path) / FILE if config.name_or_path else FILE


def _listed(tokens: int | list[int] | None) -> list[int]:
    return [] if tokens is None else [tokens] if isinstance(tokens, int) else list(tokens)
