"""DistilBERT: BERT's layers under other names."""

from __future__ import annotations

from recyclable.architectures.family import Family, Interchangeable, WayThrough

DISTILBERT = Family(
    ("distilbert",),
    heads=Interchangeable(r"attention\.(?:q|k|v)_lin\.(?:weight|bias)", r"attention\.out_lin\.weight"),
    neurons=Interchangeable(r"ffn\.lin1\.(?:weight|bias)", r"ffn\.lin2\.weight"),
    way_through=WayThrough(("attention",), "attention.out_lin", "attention.q_lin"),
    classifies_first=True,
)
