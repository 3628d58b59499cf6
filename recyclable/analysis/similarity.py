"""How alike two models work on the same texts: attention head by head, hidden states, neurons, layer by layer.

After "Recyclable Tuning for Continual Pre-training" (arXiv 2305.08702), which compares a base and its descendants head
by head. A number alone says little: measure an unrelated model of the same shape beside it.

Shapes: B texts, T tokens (padding included), A heads, N layers, F neurons of a layer, n and m widths of the two models.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from recyclable.architectures.sublayers import sublayer_ends
from recyclable.data.examples import Batch, model_inputs
from recyclable.errors import InputError
from recyclable.weights.team import ALONE, Team

TOP_NEURONS = 0.05
"""The share of a layer's neurons, the most active of a token, in which two models are compared."""
_NOTHING = torch.zeros((), dtype=torch.float64)
"""What sums begin with."""


@dataclass(frozen=True)
class Similarity:
    """Two models on the same texts; all numbers are means over tokens that are no padding, 1 means the same."""

    heads: np.ndarray
    """[N, A]: cosine of two heads' attention from a token to all others."""
    cka: np.ndarray
    """[N + 1]: linear CKA of the hidden states, embedding output first."""
    neurons: np.ndarray
    """[N]: share of a token's most active 5% of neurons that are the same in both; 0.05 by chance."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {name: values.tolist() for name, values in vars(self).items()}


class Moments:
    """Sums in fp64 from which linear CKA follows, whatever the batches (Kornblith et al. 2019, arXiv 1905.00414)."""

    def __init__(self) -> None:
        self.sums: list[torch.Tensor] = []

    def add(self, x_Tn: torch.Tensor, y_Tm: torch.Tensor) -> None:
        """Two models' states of the same tokens."""
        x, y = x_Tn.double(), y_Tm.double()
        self.include([x.new_tensor(len(x)), x.sum(0), y.sum(0), x.T @ x, y.T @ y, x.T @ y])

    def include(self, sums: list[torch.Tensor]) -> None:
        """Another one's `sums`."""
        self.sums = [mine + other for mine, other in zip(self.sums, sums, strict=True)] if self.sums else sums

    def cka(self) -> float:
        """|X'Y|^2 / (|X'X| |Y'Y|) of centred X and Y, Frobenius norms, the paper's linear CKA; nan if constant."""
        count, x, y, xx, yy, xy = self.sums
        xx, yy, xy = (moment - torch.outer(a, b) / count for moment, a, b in ((xx, x, x), (yy, y, y), (xy, x, y)))
        return float(xy.square().sum() / (xx.norm() * yy.norm()))


def compare(
    first: nn.Module, second: nn.Module, batches: Iterator[Batch] | list[Batch], team: Team = ALONE
) -> Similarity:
    """Run two backbones over the same batches; a few sums are all that is kept.

    Args:
        first, second: models of transformers in evaluation, with `attn_implementation` eager.
        batches: tokenised texts with an `attention_mask`, the same for every member of the team, who share them out.

    A collective. Raises InputError when the models differ in layers, heads or neurons.
    """
    heads = neurons = _NOTHING
    tokens, states = 0.0, list[Moments]()
    for number, batch in enumerate(batches):
        if number % team.size != team.rank:
            continue
        one, other = (_run(model, batch) for model in (first, second))
        _require_alike(one, other)
        real = batch["attention_mask"].bool()
        tokens += float(real.sum())
        heads = heads + torch.stack([_heads(*pair, real) for pair in zip(one.heads, other.heads, strict=True)])
        neurons = neurons + torch.stack([_top(*pair, real) for pair in zip(one.neurons, other.neurons, strict=True)])
        states = states or [Moments() for _ in one.states]
        for moments, *pair in zip(states, one.states, other.states, strict=True):
            moments.add(*(of[real].cpu() for of in pair))
    parts = [part for part in team.gather((heads, neurons, tokens, [m.sums for m in states])) if part[2]]
    if not parts:
        raise InputError("texts", "found none, expected at least one")
    tokens = sum(part[2] for part in parts)
    whole = [Moments() for _ in parts[0][3]]
    for _, _, _, theirs in parts:
        for moments, sums in zip(whole, theirs, strict=True):
            moments.include(sums)
    return Similarity(
        heads=(sum((part[0] for part in parts), _NOTHING) / tokens).numpy(),
        cka=np.array([moments.cka() for moments in whole]),
        neurons=(sum((part[1] for part in parts), _NOTHING) / tokens).numpy(),
    )


@dataclass(frozen=True)
class _Told:
    heads: tuple[torch.Tensor, ...]
    """N of [B, A, T, T]"""
    states: tuple[torch.Tensor, ...]
    """N + 1 of [B, T, n]"""
    neurons: list[torch.Tensor]
    """N of [B, T, F]"""


def _run(model: nn.Module, batch: Batch) -> _Told:
    device = next(model.parameters()).device
    inputs = {name: tensor.to(device) for name, tensor in model_inputs(batch).items()}
    with torch.no_grad(), _listening(model) as neurons:
        told = model(**inputs, output_attentions=True, output_hidden_states=True)
    if told.get("attentions") is None:
        raise InputError(
            "similarity", f"{type(model).__name__} does not tell its attention patterns as one row of layers"
        )
    tokens = told.hidden_states[0].shape[:2]  # OPT's networks see them in one row
    return _Told(told.attentions, told.hidden_states, [each.reshape(*tokens, -1) for each in neurons])


@contextmanager
def _listening(model: nn.Module) -> Iterator[list[torch.Tensor]]:
    """What goes into each feed-forward network's second matrix: its neurons' activations, in the order of layers."""
    heard: list[torch.Tensor] = []
    hooks = [
        end.module.register_forward_pre_hook(lambda _, inputs: heard.append(inputs[0]))
        for end in sublayer_ends(model)
        if not end.attention
    ]
    try:
        yield heard
    finally:
        for hook in hooks:
            hook.remove()


def _require_alike(one: _Told, other: _Told) -> None:
    for what, of in (("attention heads", lambda t: t.heads), ("neurons", lambda t: t.neurons)):
        counts = [[tensor.shape[1 if what == "attention heads" else 2] for tensor in of(told)] for told in (one, other)]
        if counts[0] != counts[1] or not counts[0]:
            raise InputError("similarity", f"the models have {counts[0]} and {counts[1]} {what} in their layers")


def _heads(one_BATT: torch.Tensor, other_BATT: torch.Tensor, real_BT: torch.Tensor) -> torch.Tensor:
    """[A] in fp64: cosines of attention rows, summed over the tokens that look."""
    cosines_BAT = torch.cosine_similarity(one_BATT.double(), other_BATT.double(), dim=-1)
    return (cosines_BAT * real_BT[:, None].to(cosines_BAT.device)).sum((0, 2)).cpu()


def _top(one_BTF: torch.Tensor, other_BTF: torch.Tensor, real_BT: torch.Tensor) -> torch.Tensor:
    """Share of the most active neurons that two models have in common, summed over tokens; fp64.

    Few neurons answer to a token (Zhang et al. 2022, arXiv 2110.01786), so it matters which.
    """
    count = max(1, round(TOP_NEURONS * one_BTF.shape[-1]))
    chosen = []
    for activations in (one_BTF[real_BT], other_BTF[real_BT]):
        chosen.append(torch.zeros_like(activations).scatter_(1, activations.topk(count).indices, 1.0))
    return (chosen[0] * chosen[1]).sum().double().cpu() / count


def plot(found: dict[str, Similarity], path: Path) -> None:
    """Heat maps layers x heads, one per pair of models, and below them hidden states and neurons by layer.

    Args:
        found: what is compared -> how alike it is.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, len(found), figsize=(4.6 * len(found), 6.4), squeeze=False, layout="constrained")
    for column, (title, similarity) in enumerate(found.items()):
        above, below = axes[:, column]
        image = above.imshow(similarity.heads, vmin=0, vmax=1, cmap="viridis", aspect="auto", origin="lower")
        layers, heads = similarity.heads.shape
        above.set(title=title, xlabel="head", ylabel="layer", xticks=range(heads), yticks=range(layers))
        for (layer, head), value in np.ndenumerate(similarity.heads) if layers * heads <= 150 else ():
            above.text(
                head, layer, f"{value:.2f}", ha="center", va="center", fontsize=7, color="w" if value < 0.6 else "k"
            )
        below.plot(range(layers + 1), similarity.cka, marker="o", label="hidden states (CKA)")
        below.plot(range(1, layers + 1), similarity.neurons, marker="s", label="top neurons in common")
        below.axhline(TOP_NEURONS, linestyle=":", color="gray", label="neurons by chance")
        below.set(xlabel="layer (0: embeddings)", ylim=(0, 1.02), xticks=range(layers + 1))
        below.grid(alpha=0.3)
    axes[1, 0].legend()
    figure.colorbar(image, ax=axes[0].tolist(), label="cosine of attention")
    figure.savefig(path, dpi=120)
    plt.close(figure)
