"""The runs that `benchmarks/plan.py` compares predictions with: twelve that count, others to mend the model by."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

BERT = {"model_type": "bert", "hidden_size": 512, "num_attention_heads": 8, "intermediate_size": 2048}
ROBERTA = {**BERT, "model_type": "roberta", "hidden_size": 640, "num_attention_heads": 10, "pad_token_id": 1}
LLAMA = {
    "model_type": "llama",
    "hidden_size": 512,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 1536,
}
TIED = {**LLAMA, "tie_word_embeddings": True}


@dataclass(frozen=True)
class Configuration:
    """One run.

    Args:
        model: fields of its config.
        run: settings of run.yaml beside those that all runs have.
        zero: `zero_optimization` of the ds_config.
        machine: what else its ds_config has.
    """

    name: str
    verb: str
    model: dict[str, Any]
    run: dict[str, Any] = field(default_factory=dict)
    zero: dict[str, Any] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)
    ranks: int = 1


def _bert(layers: int, vocabulary: int, **more: Any) -> dict[str, Any]:
    return {**BERT, "num_hidden_layers": layers, "vocab_size": vocabulary, **more}


def _llama(layers: int, vocabulary: int, **more: Any) -> dict[str, Any]:
    return {**LLAMA, "num_hidden_layers": layers, "vocab_size": vocabulary, **more}


BF16 = {"bf16": {"enabled": True}}
SHAPE = {"max_length": 64, "train_batch_size": 8}
LONG = {"max_length": 128, "train_batch_size": 8}
NOTHING_KEPT = {
    "stage": 3,
    "stage3_param_persistence_threshold": 0,
    "stage3_max_live_parameters": 0,
    "stage3_prefetch_bucket_size": 0,
    "stage3_max_reuse_distance": 0,
}
OFFLOAD = {"device": "cpu"}
SMALL_BUCKETS = {"reduce_bucket_size": 5_000_000, "allgather_bucket_size": 5_000_000}
EARLIER = (
    Configuration("encoder, ZeRO-0", "pretrain", _bert(12, 30522), LONG, {"stage": 0}),
    Configuration(
        "encoder, ZeRO-1, 2 ranks", "pretrain", _bert(10, 30522), SHAPE, {"stage": 1, **SMALL_BUCKETS}, {}, 2
    ),
    Configuration(
        "encoder's task, ZeRO-2", "tune", {**ROBERTA, "num_hidden_layers": 8, "vocab_size": 50265}, LONG, {"stage": 2}
    ),
    Configuration(
        "decoder, ZeRO-2, 2 ranks", "pretrain", _llama(10, 32000), LONG, {"stage": 2, **SMALL_BUCKETS}, {}, 2
    ),
    Configuration("decoder, ZeRO-2, bf16", "pretrain", _llama(14, 32000), LONG, {"stage": 2}, BF16),
    Configuration(
        "decoder, ZeRO-3, 2 ranks",
        "pretrain",
        {**TIED, "num_hidden_layers": 10, "vocab_size": 60000},
        LONG,
        {"stage": 3, **SMALL_BUCKETS},
        {},
        2,
    ),
    Configuration(
        "decoder, ZeRO-3, bf16, 2 ranks, layer by layer", "pretrain", _llama(16, 32000), LONG, NOTHING_KEPT, BF16, 2
    ),
    Configuration(
        "LoRA on a decoder, ZeRO-1, bf16",
        "tune",
        _llama(20, 32000, hidden_size=768, intermediate_size=2048, num_attention_heads=12),
        {**LONG, "tuning": "lora"},
        {"stage": 1},
        BF16,
    ),
    Configuration(
        "online teacher, decoder, ZeRO-2", "pretrain", _llama(8, 32000), {**LONG, "teacher": "base"}, {"stage": 2}
    ),
    Configuration(
        "optimizer on the CPU, ZeRO-2, bf16",
        "pretrain",
        _llama(12, 32000),
        SHAPE,
        {"stage": 2, "offload_optimizer": OFFLOAD},
        BF16,
    ),
    Configuration(
        "optimizer and parameters on the CPU, ZeRO-3, bf16, 2 ranks",
        "pretrain",
        _llama(14, 32000),
        SHAPE,
        {"stage": 3, "offload_optimizer": OFFLOAD, "offload_param": OFFLOAD},
        BF16,
        2,
    ),
    Configuration(
        "262k tokens, decoder, ZeRO-1",
        "pretrain",
        _llama(6, 262144, hidden_size=256, intermediate_size=1024, num_attention_heads=4, tie_word_embeddings=True),
        {"max_length": 96, "train_batch_size": 8},
        {"stage": 1},
    ),
)
ENCODER = {"model_type": "bert", "hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536}
OTHER = {**ROBERTA, "hidden_size": 448, "num_attention_heads": 7, "intermediate_size": 1792}
DECODER = {**LLAMA, "hidden_size": 384, "num_attention_heads": 6, "num_key_value_heads": 2, "intermediate_size": 1280}
WIDE = {**LLAMA, "hidden_size": 640, "num_attention_heads": 10, "num_key_value_heads": 5, "intermediate_size": 1792}


def _of(shape: dict[str, Any], layers: int, vocabulary: int, **more: Any) -> dict[str, Any]:
    return {**shape, "num_hidden_layers": layers, "vocab_size": vocabulary, **more}


def _texts(length: int, batch: int, **more: Any) -> dict[str, Any]:
    return {"max_length": length, "train_batch_size": batch, **more}


AGAIN = {"activation_checkpointing": {}}
ON_CPU = {"offload_optimizer": OFFLOAD, "offload_param": OFFLOAD}
TWELVE = (
    Configuration("encoder, ZeRO-0", "pretrain", _of(ENCODER, 16, 24000), _texts(40, 6), {"stage": 0}),
    Configuration("encoder, ZeRO-1, 2 ranks", "pretrain", _of(OTHER, 9, 28000), _texts(56, 4), {"stage": 1}, ranks=2),
    Configuration(
        "encoder's task, ZeRO-2, checkpointing",
        "tune",
        _of(ENCODER, 12, 30000),
        _texts(200, 8),
        {"stage": 2},
        AGAIN,
    ),
    Configuration(
        "decoder, ZeRO-2, long texts",
        "pretrain",
        _of(DECODER, 8, 14000),
        _texts(512, 4),
        {"stage": 2, "reduce_bucket_size": 3_000_000},
    ),
    Configuration(
        "decoder, ZeRO-2, bf16, 2 ranks", "pretrain", _of(WIDE, 7, 12000), _texts(36, 4), {"stage": 2}, BF16, 2
    ),
    Configuration(
        "decoder, ZeRO-3, 2 ranks",
        "pretrain",
        _of(DECODER, 14, 36000, tie_word_embeddings=True),
        _texts(44, 4),
        {"stage": 3, "reduce_bucket_size": 4_000_000},
        ranks=2,
    ),
    Configuration(
        "encoder, ZeRO-3, bf16, checkpointing, 2 ranks",
        "pretrain",
        _of(OTHER, 12, 20000),
        _texts(72, 4),
        {"stage": 3, "stage3_prefetch_bucket_size": 0, "stage3_max_live_parameters": 4_000_000},
        BF16 | AGAIN,
        2,
    ),
    Configuration(
        "LoRA on a decoder, ZeRO-2", "tune", _of(WIDE, 16, 26000), _texts(100, 6, tuning="lora"), {"stage": 2}
    ),
    Configuration(
        "online teacher, decoder, ZeRO-1",
        "pretrain",
        _of(DECODER, 10, 22000),
        _texts(64, 6, teacher="base"),
        {"stage": 1},
        BF16,
    ),
    Configuration(
        "optimizer on the CPU, ZeRO-2, 2 ranks",
        "pretrain",
        _of(OTHER, 8, 16000),
        _texts(48, 4),
        {"stage": 2, "offload_optimizer": OFFLOAD},
        ranks=2,
    ),
    Configuration(
        "optimizer and parameters on the CPU, ZeRO-3, bf16, 2 ranks",
        "pretrain",
        _of(WIDE, 9, 18000),
        _texts(32, 4),
        {"stage": 3, **ON_CPU},
        BF16,
        2,
    ),
    Configuration(
        "262k tokens, decoder, ZeRO-2",
        "pretrain",
        _of(DECODER, 3, 262144, hidden_size=192, intermediate_size=768, tie_word_embeddings=True),
        _texts(80, 4),
        {"stage": 2},
    ),
)
QUICK = ("encoder, ZeRO-1, 2 ranks", "LoRA on a decoder, ZeRO-2")
SHORT = {"max_length": 48, "train_batch_size": 8}
CALIBRATION = (
    *EARLIER,
    Configuration("c0 decoder 0", "pretrain", _llama(6, 20000), SHORT, {"stage": 0}),
    Configuration("c0b decoder 0 bf16", "pretrain", _llama(6, 20000), SHORT, {"stage": 0}, BF16),
    Configuration("c1 encoder 1", "pretrain", _bert(6, 20000), SHORT, {"stage": 1}),
    Configuration("c2 encoder 2 r2", "pretrain", _bert(6, 20000), SHORT, {"stage": 2}, {}, 2),
    Configuration("c2b decoder 2 bf16 r2", "pretrain", _llama(8, 20000), SHORT, {"stage": 2}, BF16, 2),
    Configuration("c3 decoder 3", "pretrain", _llama(8, 20000), SHORT, {"stage": 3}),
    Configuration("c3b encoder 3 bf16 r2", "pretrain", _bert(8, 20000), SHORT, {"stage": 3}, BF16, 2),
    Configuration("c4 acts", "pretrain", _bert(6, 5000), {"max_length": 256, "train_batch_size": 24}, {"stage": 2}),
    Configuration("c5 lora", "tune", _bert(12, 20000), {**SHAPE, "tuning": "lora"}, {"stage": 2}),
    Configuration("c6 off2", "pretrain", _bert(8, 20000), SHORT, {"stage": 2, "offload_optimizer": OFFLOAD}, {}),
    Configuration(
        "c7 off3",
        "pretrain",
        _bert(8, 20000),
        SHORT,
        {"stage": 3, "offload_optimizer": OFFLOAD, "offload_param": OFFLOAD},
        {},
        2,
    ),
    Configuration("c8 teacher 3 r2", "pretrain", _bert(6, 20000), {**SHORT, "teacher": "base"}, {"stage": 3}, {}, 2),
    Configuration(
        "c9 vocab 1",
        "pretrain",
        _llama(2, 150000, hidden_size=256, tie_word_embeddings=True),
        SHORT,
        {"stage": 2},
        BF16,
    ),
)
