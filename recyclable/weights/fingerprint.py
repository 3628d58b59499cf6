"""Content digests of a base: the same for every head view and file layout, different for any changed bit."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from recyclable.weights.base import Base
from recyclable.weights.digest import Digested, sha256_file, sha256_json

OUTPUT_FIELDS = (
    *("model_type", "hidden_act", "hidden_activation", "layer_norm_eps", "rms_norm_eps", "norm_eps"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "attention_bias", "mlp_bias", "sliding_window"),
    *("position_embedding_type", "max_position_embeddings", "rope_theta", "rope_scaling", "rope_parameters"),
    *("tie_word_embeddings", "pad_token_id", "logit_scale", "final_logit_softcapping"),
)
"""Config fields that change what the same weights compute; everything else in config.json is bookkeeping."""
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


def fingerprint(base: Base, read: Digested | None = None) -> Fingerprint:
    """Digest a base, dtype-exact, tensors by canonical name; in parallel.

    Args:
        read: what the base was read through already, so that only the rest has to be read (None: `base.hashed`).
    """
    tensors = (read or base.hashed).tensor_digests()
    return Fingerprint(
        weights=sha256_json([tensors[name] for name in sorted(tensors)]),
        tokenizer=tokenizer_digest(base),
        config=config_digest(base),
    )


def config_digest(base: Base) -> str:
    """SHA-256 (hex) of the config fields that change outputs."""
    fields = base.config.to_dict()
    return sha256_json({field: fields.get(field) for field in OUTPUT_FIELDS})


def tokenizer_digest(base: Base) -> str:
    """SHA-256 (hex) of the tokenizer's files: vocabularies of one size with other pieces differ."""
    return sha256_json({f: sha256_file(base.folder / f) for f in _TOKENIZER_FILES if (base.folder / f).is_file()})
