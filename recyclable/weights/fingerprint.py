"""Content digests of a base: the same for every head view and file layout, different for any changed bit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from recyclable.architectures.fields import computing_fields
from recyclable.weights.base import Base
from recyclable.weights.digest import Digested
from recyclable.weights.hashes import sha256_file, sha256_json

_RULE = "2:"
"""How a config's digest begins; by the first rule, which older manifests and lineages recorded, it is bare hex."""
_FIRST_RULE = (
    *("model_type", "hidden_act", "hidden_activation", "layer_norm_eps", "rms_norm_eps", "norm_eps"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "attention_bias", "mlp_bias", "sliding_window"),
    *("position_embedding_type", "max_position_embeddings", "rope_theta", "rope_scaling", "rope_parameters"),
    *("tie_word_embeddings", "pad_token_id", "logit_scale", "final_logit_softcapping"),
)
"""The fields that the first rule took; never to be changed."""
_TOKENIZER_FILES = (
    *("tokenizer.json", "vocab.txt", "vocab.json", "merges.txt"),
    *("spiece.model", "spm.model", "sentencepiece.bpe.model", "tokenizer.model"),
)


@dataclass(frozen=True)
class Fingerprint:
    """SHA-256 digests (hex) of weights, tokenizer and of the config fields that decide what the weights compute."""

    weights: str
    tokenizer: str
    config: str
    """With the number of its rule in front."""

    def __str__(self) -> str:
        return self.weights[:12]

    def as_dict(self) -> dict[str, str]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def recorded(cls, record: Mapping[str, str], base: Base) -> Fingerprint:
        """What a manifest or lineage recorded, to be compared with the base's own by ==.

        A config digest of an older rule becomes today's where the base's config has it by that rule. Raises TypeError
        when the record is broken.
        """
        found = cls(**record)
        if found.config != _first_digest(base):
            return found
        return cls(found.weights, found.tokenizer, config_digest(base))


def fingerprint(base: Base, read: Digested[Base] | None = None) -> Fingerprint:
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
    """SHA-256 (hex) of the config fields that decide what the weights compute, with the number of the rule in front."""
    return _RULE + sha256_json(computing_fields(base.config))


def _first_digest(base: Base) -> str:
    fields = base.config.to_dict()
    return sha256_json({field: fields.get(field) for field in _FIRST_RULE})


def tokenizer_digest(base: Base) -> str:
    """SHA-256 (hex) of the tokenizer's files: vocabularies of one size with other pieces differ."""
    return sha256_json({f: sha256_file(base.folder / f) for f in _TOKENIZER_FILES if (base.folder / f).is_file()})
