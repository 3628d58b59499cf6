"""Content digests of a base: the same for every head view and file layout, different for any changed bit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from recyclable.architectures.fields import computing_fields, dropping_fields
from recyclable.weights.base import Base
from recyclable.weights.chat_template import chat_template_digest
from recyclable.weights.digest import Digested
from recyclable.weights.hashes import sha256_file, sha256_json
from recyclable.weights.tokenizer_files import class_files

_RULE = "2:"
"""How a config's digest begins; by the first rule, which older manifests and lineages recorded, it is bare hex."""
_FIRST_RULE = (
    *("model_type", "hidden_act", "hidden_activation", "layer_norm_eps", "rms_norm_eps", "norm_eps"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "attention_bias", "mlp_bias", "sliding_window"),
    *("position_embedding_type", "max_position_embeddings", "rope_theta", "rope_scaling", "rope_parameters"),
    *("tie_word_embeddings", "pad_token_id", "logit_scale", "final_logit_softcapping"),
)
"""The fields that the first rule took; never to be changed."""
_FIRST_FILES = (
    *("tokenizer.json", "vocab.txt", "vocab.json", "merges.txt"),
    *("spiece.model", "spm.model", "sentencepiece.bpe.model", "tokenizer.model"),
)
"""The files of a tokenizer that the first rule took, whatever its class; never to be changed."""
UNKNOWN = "unknown"


@dataclass(frozen=True)
class Fingerprint:
    """SHA-256 digests (hex) of weights, tokenizer and of the config fields that decide what the weights compute.

    Beside them that of the chat template, which makes no other base: it is told where it differs, never refused, and
    no part of ==.
    """

    weights: str
    tokenizer: str
    config: str
    """With the number of its rule in front."""
    chat_template: str | None = field(default=UNKNOWN, compare=False)
    """None where there is none; `UNKNOWN` in records from before it was digested."""

    def __str__(self) -> str:
        return self.weights[:12]

    def as_dict(self) -> dict[str, Any]:
        """For JSON, without what is not known."""
        return {name: digest for name, digest in asdict(self).items() if digest != UNKNOWN}

    def told(self, base: str, trained: Base | None = None) -> dict[str, str]:
        """The digests of what decides what a base computes, by what messages call it.

        Args:
            trained: the base, where it is trained: its rates of dropout decide as well.
        """
        found = {base: self.weights, f"{base}'s tokenizer": self.tokenizer, f"{base}'s config": self.config}
        if trained is None:
            return found
        return {**found, f"{base}'s dropout": sha256_json(dropping_fields(trained.config))}

    @classmethod
    def recorded(cls, record: Mapping[str, Any], base: Base) -> Fingerprint:
        """What a manifest or lineage recorded, to be compared with the base's own by ==.

        A digest of config or tokenizer by an older rule becomes today's where the base has it by that rule. Raises
        TypeError when the record is broken.
        """
        found = cls(**record)
        if found.config == _first_digest(base):
            found = replace(found, config=config_digest(base))
        if found.tokenizer == _digest_of_files(base, _FIRST_FILES):
            found = replace(found, tokenizer=tokenizer_digest(base))
        return found


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
        chat_template=chat_template_digest(base.folder),
    )


def config_digest(base: Base) -> str:
    """SHA-256 (hex) of the config fields that decide what the weights compute, with the number of the rule in front."""
    return _RULE + sha256_json(computing_fields(base.config))


def _first_digest(base: Base) -> str:
    fields = base.config.to_dict()
    return sha256_json({field: fields.get(field) for field in _FIRST_RULE})


def tokenizer_digest(base: Base) -> str:
    """SHA-256 (hex) of the tokenizer's files: vocabularies of one size with other pieces differ."""
    files = {*_FIRST_FILES, *class_files(base.folder, base.config)}
    if not (base.folder / "tokenizer.json").is_file():
        files.add("added_tokens.json")
    return _digest_of_files(base, files)


def _digest_of_files(base: Base, names: Iterable[str]) -> str:
    return sha256_json({name: sha256_file(base.folder / name) for name in names if (base.folder / name).is_file()})
