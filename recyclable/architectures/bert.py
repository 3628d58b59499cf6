"""BERT and what took over its layers."""

from __future__ import annotations

from recyclable.architectures.family import Family, Interchangeable

HEADS = Interchangeable(
    r"attention\.self\.(?:query|key|value)\.(?:weight|bias)",
    r"attention\.output\.dense\.weight",
)
NEURONS = Interchangeable(r"intermediate\.dense\.(?:weight|bias)", r"output\.dense\.weight")

BERT = Family(
    ("bert", "ernie", "megatron-bert"),
    HEADS,
    NEURONS,
    masked_head=lambda model: (model.cls.predictions.transform, model.cls.predictions.decoder),
)
ELECTRA = Family(("electra",), HEADS, NEURONS)
