"""Content digests of a base: the same for every head view and file layout, different for any changed bit."""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from recyclable.weights.base import Base

# Config fields that change what the same weights compute; everything else in config.json is bookkeeping.
_OUTPUT_FIELDS = (
    *("model_type", "hidden_act", "hidden_activation", "layer_norm_eps", "rms_norm_eps", "norm_eps"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "attention_bias", "mlp_bias", "sliding_window"),
    *("position_embedding_type", "max_position_embeddings", "rope_theta", "rope_scaling", "rope_parameters"),
    *("tie_word_embeddings", "pad_token_id", "logit_scale", "final_logit_softcapping"),
)
_TOKENIZER_FILES = (
    *("tokenizer.json", "vocab.txt", "vocab.json", "merges.txt"),
    *("spiece.model", "spm.model", "sentencepiece.bpe.model", "tokenizer.model"),
)


@dataclass(frozen=True)
class Fingerprint:
    """SHA-256 digests (hex) of weights, tokenizer and of the config fields that change outputs."""

    weights: str
    tokenizer: str
    config: str

    def __str__(self) -> str:
        return self.weights[:12]

    def as_dict(self) -> dict[str, str]:
        """For JSON."""
        return asdict(self)


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, streamed (hex)."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sha256_json(value: object) -> str:
    """SHA-256 of a value's canonical JSON (hex)."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _tensor_digest(base: Base, name: str) -> str:
    tensor = base[name].contiguous()
    digest = hashlib.sha256(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
    digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def fingerprint(base: Base) -> Fingerprint:
    """Digest a base tensor by tensor, in parallel (hashlib lets go of the GIL), dtype-exact."""
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        tensors = list(pool.map(lambda name: _tensor_digest(base, name), base.names))
    files = {f: sha256_file(base.folder / f) for f in _TOKENIZER_FILES if (base.folder / f).is_file()}
    fields = base.config.to_dict()
    return Fingerprint(
        weights=sha256_json(tensors),
        tokenizer=sha256_json(files),
        config=sha256_json({field: fields.get(field) for field in _OUTPUT_FIELDS}),
    )
