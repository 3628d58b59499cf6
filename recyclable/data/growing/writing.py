"""Writes a tokenizer with its new pieces: every file that it is read from, or none that lacks them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from recyclable.data.growing import sentence_piece
from recyclable.data.growing.growth import Growth
from recyclable.data.growing.learning import SETTING
from recyclable.errors import InputError
from recyclable.weights.strict_json import read_json
from recyclable.weights.vocabulary import copy_tokenizer, load_tokenizer

_MAIN = "tokenizer.json"


def write_grown(
    source: Path, tokenizer: PreTrainedTokenizerBase, growth: Growth, config: PretrainedConfig, into: Path
) -> dict[str, str]:
    """A tokenizer's files with the new pieces in them; returns the names of those left out, and why.

    Args:
        source: the old tokenizer's directory, `tokenizer` what was read from it.
        config: of the model with room for all pieces.
        into: a directory.

    Raises InputError where transformers does not read there what was to be written.
    """
    copy_tokenizer(source, into, config)
    known, main = tokenizer.get_vocab(), into / _MAIN
    content = json.loads(main.read_text(encoding="utf-8") if main.is_file() else tokenizer.backend_tokenizer.to_str())
    _extend(content["model"], growth, known, source)
    main.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    left_out = {}
    scores = growth.scores or (None,) * len(growth.pieces)
    for path in sentence_piece.files(into):
        why = sentence_piece.appended(path, dict(zip(growth.pieces, scores, strict=True)), growth.first, known)
        left_out.update({path.name: why} if why else {})
    left_out.update(_extend_text_files(into, growth, known))
    for name in left_out:
        (into / name).unlink()
    _require_reads(into, config, known, growth)
    return left_out


def _extend(model: dict[str, Any], growth: Growth, known: dict[str, int], source: Path) -> None:
    """Put the new pieces into what tokenizer.json calls `model`."""
    ids = dict(zip(growth.pieces, growth.rows, strict=True))
    if growth.model != "Unigram":  # with added tokens that it has not: they get ids behind the model's pieces
        model["vocab"] = _by_id({**known, **model["vocab"], **ids})
    if growth.model == "BPE":
        pairs = not model["merges"] or isinstance(model["merges"][0], list)
        model["merges"] += [list(pair) if pairs else " ".join(pair) for pair in growth.merges]
    if growth.model != "Unigram":
        return
    of = {row: piece for piece, row in known.items()}  # a list has no holes: added tokens stand for themselves there
    for row in range(len(model["vocab"]), growth.first):
        if row not in of:
            raise InputError(SETTING, f"the tokenizer of {source} has no piece {row}, and a list of pieces no gaps")
        model["vocab"].append([of[row], 0.0])
    model["vocab"] += [[piece, score] for piece, score in zip(growth.pieces, growth.scores, strict=True)]


def _extend_text_files(into: Path, growth: Growth, known: dict[str, int]) -> dict[str, str]:
    """The same in the older files of BPE and WordPiece, where they are; returns which cannot have it, and why."""
    left_out = {}
    if (lines := into / "vocab.txt").is_file():
        text = lines.read_text(encoding="utf-8")
        if (found := len(text.rstrip("\n").split("\n"))) == growth.first:
            lines.write_text("\n".join([text.rstrip("\n"), *growth.pieces, ""]), encoding="utf-8")
        else:
            left_out[lines.name] = f"its {found} lines do not end where the new pieces begin, at {growth.first}"
    if (table := into / "vocab.json").is_file():
        grown = _by_id({**known, **read_json(table), **dict(zip(growth.pieces, growth.rows, strict=True))})
        table.write_text(json.dumps(grown, ensure_ascii=False), encoding="utf-8")
    if (pairs := into / "merges.txt").is_file():
        text = pairs.read_text(encoding="utf-8").rstrip("\n")
        pairs.write_text("\n".join([text, *map(" ".join, growth.merges), ""]), encoding="utf-8")
    return left_out


def _by_id(vocabulary: dict[str, int]) -> dict[str, int]:
    """In the order of the ids: a tokenizer tells its pieces in another one each time."""
    return dict(sorted(vocabulary.items(), key=lambda item: item[1]))


def _require_reads(into: Path, config: PretrainedConfig, known: dict[str, int], growth: Growth) -> None:
    """InputError unless transformers reads every old piece under its id, and the new ones under theirs."""
    found = load_tokenizer(into, config).get_vocab()
    wanted = {**known, **dict(zip(growth.pieces, growth.rows, strict=True))}
    if found != wanted:
        other = sorted(piece for piece in found.keys() | wanted.keys() if found.get(piece) != wanted.get(piece))
        problem = f"transformers reads {other[0]!r} as {found.get(other[0])}, expected {wanted.get(other[0])}"
        raise InputError(SETTING, f"{problem}: this kind of tokenizer cannot be extended")
