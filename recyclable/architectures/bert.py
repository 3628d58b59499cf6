"""BERT and what took over its layers."""

from __future__ import annotations

from recyclable.architectures.family import Family, Interchangeable, WayThrough

HEADS = Interchangeable(
    r"attention\.self\.(?:query|key|value)\.(?:weight|bias)",
    r"attention\.output\.dense\.weight",
)
WAY = WayThrough(
    ("attention.ln", "attention.LayerNorm", "attention.self_attn_layer_norm", "attention.self"),
    "attention.output.dense",
    "attention.self.query",
)
"""By way of the norm where one stands before the attention, as Megatron's and RoBERTa's kin have it."""
NEURONS = Interchangeable(r"intermediate\.dense\.(?:weight|bias)", r"output\.dense\.weight")

BERT = Family(
    ("bert", "ernie", "megatron-bert"),
    HEADS,
    NEURONS,
    masked_head=lambda model: (model.cls.predictions.transform, model.cls.predictions.decoder),
    way_through=WAY,
    classifies_first=True,
)
ELECTRA = Family(("electra",), HEADS, NEURONS, way_through=WAY, classifies_first=True)
