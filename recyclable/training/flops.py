"""How much of the accelerator's arithmetic a run uses: the model FLOPs of its steps over the device's peak.

The convention is PaLM's (Chowdhery et al. 2022, arXiv 2204.02311, appendix B; weights as in Kaplan et al. 2020, arXiv
2001.08361): what a training step cannot do without, however it is computed, so that recomputed layers count once. Each
element of a weight matrix costs 2 FLOP a token forward and 4 backward, each pair of query and key 4 a layer and element
of the width of all heads forward and 8 backward. A causal model's pairs count in full, as there and as everywhere that
MFU is told. A head's weights count only for the tokens that the loss looks at; those of layers count for every token,
even where the last layer computes some alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn
from transformers import PreTrainedModel

from recyclable.objectives.objective import Objective

_FORWARD, _BACKWARD = 2, 4
_READ = re.compile(r"\.(?:EncDecAttention|encoder_attn|crossattention)\.(?:\w+\.)*(?:k|v|k_proj|v_proj|key|value)\.")
"""Weights of a decoder that meet the encoder's tokens: what makes keys and values of them."""


class Work(NamedTuple):
    """What some steps have to do, all ranks' together.

    Rows are taken to be of one length, as packed ones are; where they differ, attention is a little more.
    """

    rows: float
    tokens: float
    """That are no padding; of an encoder-decoder the encoder's."""
    told: float
    """Tokens (or texts) that the loss looks at."""


@dataclass(frozen=True)
class Attention:
    """Layers that compare as many queries with as many keys."""

    flops: float
    """Of all of them, a pair."""
    decoder: bool = False
    """Queries are an encoder-decoder's decoder's."""
    cross: bool = False
    """Keys are the encoder's, though queries are not."""
    window: int | None = None
    """A query sees so many keys at most."""

    def of(self, work: Work, decoded: float) -> float:
        """FLOPs, given how many tokens the decoder has."""
        queries = decoded if self.decoder else work.tokens
        keys = (decoded if self.decoder and not self.cross else work.tokens) / max(work.rows, 1.0)
        return self.flops * queries * (keys if self.window is None else min(keys, self.window))


@dataclass(frozen=True)
class ModelFlops:
    """Model FLOPs of training, by what they grow with."""

    token: float
    """For each token."""
    decoded: float
    """For each token of an encoder-decoder's decoder."""
    told: float
    """For each token that the loss looks at."""
    attention: tuple[Attention, ...]
    answers: bool = True
    """An encoder-decoder's decoder has the tokens that the loss looks at; else those of the encoder."""

    def of(self, work: Work) -> float:
        """Of that much work."""
        decoded = work.told if self.answers else work.tokens
        products = self.token * work.tokens + self.decoded * decoded + self.told * work.told
        return products + sum(each.of(work, decoded) for each in self.attention)


def model_flops(objective: Objective) -> ModelFlops:
    """The model FLOPs of an objective: its student's forward and backward passes, a teacher's forward pass.

    A frozen weight of the student has no gradient of its own, but lets one pass to what is trained before it: 2 of the
    4 backward. Where the head alone is trained, nothing passes.
    """
    flops = dict.fromkeys(("trunk", "decoder", "head"), 0.0)
    attention: list[Attention] = []
    for model in _models(objective):
        weights, is_student = list(_weights(model)), any(model is module for module in objective.student.modules())
        passes = len(objective.passes(0)) if is_student else 1
        deep = is_student and any(learned for _, place, learned in weights if place != "head")
        for size, place, learned in weights:
            backward = _BACKWARD if is_student and learned else _BACKWARD / 2 if deep else 0
            flops[place] += passes * (_FORWARD + backward) * size
        attention += _attention(model, passes * (_FORWARD + (_BACKWARD if deep else 0)))
    answers = hasattr(objective, "over_vocabulary")
    return ModelFlops(flops["trunk"], flops["decoder"], flops["head"], tuple(attention), answers)


def _models(objective: Objective) -> Iterator[PreTrainedModel]:
    """The outermost models of transformers in it."""
    seen: set[nn.Module] = set()
    for module in objective.modules():
        if isinstance(module, PreTrainedModel) and module not in seen:
            seen.update(module.modules())
            yield module


def _weights(model: PreTrainedModel) -> Iterator[tuple[float, str, bool]]:
    """(elements that a token meets; trunk, decoder or head; whether it is trained) of all matrices."""
    last = model.get_output_embeddings()  # tied to an embedding or not
    spread = set() if last is None else {id(parameter) for parameter in last.parameters()}
    looked_up = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()} - spread
    inside = {id(p) for p in model.base_model.parameters()} - spread
    if isinstance(pooler := getattr(model.base_model, "pooler", None), nn.Module):
        inside -= {id(parameter) for parameter in pooler.parameters()}
    decoder = set()
    if model.config.is_encoder_decoder and (part := model.get_decoder()) is not None:
        decoder = {id(parameter) for parameter in part.parameters()}
    config = model.config.get_text_config()
    groups = getattr(config, "num_hidden_groups", None)  # ALBERT's, each of which makes up several layers
    for name, parameter in model.named_parameters():
        shape = getattr(parameter, "ds_shape", parameter.shape)
        if len(shape) < 2 or id(parameter) in looked_up or ".original_module." in name:
            continue
        size = float(shape.numel())
        if len(shape) > 2 and (chosen := getattr(config, "num_experts_per_tok", None)):  # a matrix of each expert
            size *= chosen / shape[0]
        if groups and "layer_groups." in name:
            size *= config.num_hidden_layers / groups
        writes = id(parameter) in decoder and not _READ.search(name)
        place = "head" if id(parameter) not in inside else "decoder" if writes else "trunk"
        yield size, place, parameter.requires_grad


def _attention(model: PreTrainedModel, factor: float) -> Iterator[Attention]:
    """Of a model's layers.

    Args:
        factor: FLOP for a pair and an element of the width, of each of attention's two products.
    """
    config = model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None)
    if not heads:  # no attention as others have it
        return
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    each = 2.0 * factor * width
    if model.config.is_encoder_decoder:
        decoders = getattr(config, "decoder_layers", None) or getattr(
            config, "num_decoder_layers", config.num_hidden_layers
        )
        yield Attention(each * config.num_hidden_layers)
        yield Attention(each * decoders, decoder=True)
        yield Attention(each * decoders, decoder=True, cross=True)
        return
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    types = (
        getattr(config, "layer_types", None)
        or ["full_attention" if window is None else "sliding_attention"] * config.num_hidden_layers
    )
    yield Attention(each * types.count("full_attention"))
    yield Attention(each * types.count("sliding_attention"), window=window)
