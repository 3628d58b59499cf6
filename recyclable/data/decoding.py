"""How the tokens of an answer are chosen."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Decoding:
    """How tokens are chosen: the likeliest one, or drawn from what temperature, top-k and top-p leave."""

    max_new_tokens: int
    """An answer is cut there."""
    do_sample: bool = False
    """Draw tokens. All below is for that."""
    temperature: float = 1.0
    top_k: int = 0
    """Only the k likeliest tokens; 0 leaves all."""
    top_p: float = 1.0
    """Only the likeliest tokens that together have this probability."""
    seed: int = 0
