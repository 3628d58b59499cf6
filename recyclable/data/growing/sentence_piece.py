"""SentencePiece's own files (`tokenizer.model` and the like): read as what they are, with new pieces appended."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2

proto: Any = sentencepiece_model_pb2  # it makes its classes as it is imported
_ENDINGS = (".model", ".spm")
_UNIGRAM, _BPE = proto.TrainerSpec.UNIGRAM, proto.TrainerSpec.BPE


def files(folder: Path) -> list[Path]:
    """Those that may be SentencePiece's, by their names."""
    return sorted(path for path in folder.iterdir() if path.suffix in _ENDINGS and path.is_file())


def read(path: Path) -> Any:
    """A model as SentencePiece's protocol has it; None for any other file."""
    model = proto.ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
    except DecodeError:
        return None
    return model if model.pieces else None


def is_bpe(folder: Path) -> bool:
    """Whether a tokenizer is SentencePiece's BPE by a file of its own."""
    return any((model := read(path)) is not None and model.trainer_spec.model_type == _BPE for path in files(folder))


def appended(path: Path, pieces: Mapping[str, float | None], first: int, known: Mapping[str, int]) -> str | None:
    """Append pieces to a model's file; what keeps it from that, else None.

    Args:
        pieces: new piece -> its score; None below all others, one after the other: BPE's are priorities.
        first: the id of the first new piece.
        known: old piece -> its id in tokenizer.json: the file must have the same.
    """
    if (model := read(path)) is None or model.trainer_spec.model_type not in (_UNIGRAM, _BPE):
        return "it is no unigram or BPE model of SentencePiece"
    if len(model.pieces) != first:
        return f"its {len(model.pieces)} pieces do not end where the new ones begin, at {first}"
    normal = proto.ModelProto.SentencePiece.NORMAL
    if any(known.get(each.piece, row) != row for row, each in enumerate(model.pieces) if each.type == normal):
        return "its pieces have other ids than in tokenizer.json"
    least = min((each.score for each in model.pieces if each.type == normal), default=0.0)
    for place, (piece, score) in enumerate(pieces.items(), 1):
        model.pieces.add(piece=piece, score=least - place if score is None else score, type=normal)
    model.trainer_spec.vocab_size = len(model.pieces)
    path.write_bytes(model.SerializeToString())
    return None
