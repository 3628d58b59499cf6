"""Whether a base, and its family's classifier, can read texts as a tokenizer cut them, before anything is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from recyclable.architectures.pooling import END, PAD, class_for, ids_read, ids_shifted
from recyclable.architectures.structure import Structure
from recyclable.errors import InputError
from recyclable.weights.reader import behind_a_text


def require_embedded(
    encoded: Mapping[str, Sequence[Sequence[int]]], tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig
) -> None:
    """InputError where texts have tokens or token types that a base with this config has no embedding of.

    Args:
        encoded: what the tokenizer made of all texts, by the name of the model's input.
    """

    def highest(name: str, padding: int | None) -> int:
        return max(max(map(max, filter(None, encoded.get(name, ()))), default=0), padding or 0)

    file, own = Path(config.name_or_path) / "config.json", config.get_text_config()
    token, rows = highest("input_ids", tokenizer.pad_token_id), getattr(own, "vocab_size", None)
    if rows is not None and token >= rows:
        found = f"gives the token {tokenizer.convert_ids_to_tokens(token)!r} with id {token}"
        raise InputError(tokenizer.name_or_path, f"{found}, but {file} has vocab_size {rows}: expected lower ids")
    # DeBERTa, which says 0, embeds no types
    kind, kinds = highest("token_type_ids", tokenizer.pad_token_type_id), getattr(own, "type_vocab_size", None)
    if kinds and "token_type_ids" in encoded and kind >= kinds:
        problem = f"gives token type {kind}, but {file} has type_vocab_size {kinds}: expected lower types, or a"
        hint = "tokenizer_config.json without token_type_ids in model_input_names"
        raise InputError(tokenizer.name_or_path, f"{problem} {hint}")


def require_positions(
    texts: Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, prompts: int = 0
) -> None:
    """InputError where texts, as token ids, need more positions, prompts included, than a base with this config has."""
    length, limit = max(map(len, texts)), Structure(config).positions
    if limit is not None and length + prompts > limit:
        file, beside = Path(config.name_or_path) / "config.json", f" beside {prompts} prompts" if prompts else ""
        problem = f"makes {length} tokens of a text that is not cut{beside}, but {file} has positions for {limit}"
        raise InputError(tokenizer.name_or_path, f"{problem}: expected a max_length")


def require_readable(
    texts: Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig
) -> None:
    """InputError where the sequence classifier of a base with this config could not read token ids in batches.

    Decoders classify by the last token that is no padding, most encoder-decoders by the last end token: these must
    then be the same to config and tokenizer, and be the text's own last token.
    """
    if not any(map(len, texts)):
        raise InputError(tokenizer.name_or_path, "makes no token of any text: expected some to read")
    if (classifier := class_for(config, "SequenceClassification")) is None:
        return  # said where the model is made
    pooled, file = ids_read(config), Path(config.name_or_path) / "config.json"
    if PAD in pooled:
        if (found := config.get_text_config().pad_token_id) != tokenizer.pad_token_id:
            raise InputError(
                file,
                f"pad_token_id is {found}, expected the tokenizer's, {tokenizer.pad_token_id}: "
                f"{classifier.__name__} reads the last token before the padding",
            )
        _require_unpadded(texts, tokenizer, classifier.__name__)
    for field in sorted((pooled | ids_shifted(config)) & {END, "decoder_start_token_id"}):
        if (found := getattr(config, field, None)) not in range(config.vocab_size):
            raise InputError(file, f"{field} is {found!r}, expected a token's id: {classifier.__name__} reads it")
    if END in pooled:
        _require_ends(texts, tokenizer, config.eos_token_id, f"which {classifier.__name__} reads")


def _require_unpadded(texts: Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerBase, classifier: str) -> None:
    """InputError for a text without any token, and for one whose own last token is the pad token.

    A tokenizer that puts its pad token behind every text has its classifier read what stands before, text by text.
    """
    pad = tokenizer.pad_token_id
    if any(not ids for ids in texts):
        raise InputError(tokenizer.name_or_path, f"makes no token of a text: {classifier} has nothing to read")
    if behind_a_text(tokenizer) == pad:
        return
    if ids := next((ids for ids in texts if ids[-1] == pad), None):
        problem = f"{tokenizer.decode(ids)[-40:]!r} ends in the pad token, {tokenizer.pad_token!r}, before which"
        hint = "expected texts that do not, or another pad_token in tokenizer_config.json"
        raise InputError(tokenizer.name_or_path, f"{problem} {classifier} looks for the end of a text: {hint}")


def _require_ends(texts: Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerBase, end: int, why: str) -> None:
    """InputError unless all texts have the same number of end tokens, and at least one."""
    counts = [list(ids).count(end) for ids in texts]
    if not counts[0]:
        problem = f"its tokenizer puts no end token (id {end}, the config's eos_token_id) behind a text, {why}"
        raise InputError(tokenizer.name_or_path, problem)
    for ids, count in zip(texts, counts, strict=True):
        if count != counts[0]:
            text = tokenizer.decode(ids)
            problem = f"{count} end tokens (id {end}) in {text[:40]!r}, {why}; expected {counts[0]} as in the others"
            raise InputError(tokenizer.name_or_path, problem)
