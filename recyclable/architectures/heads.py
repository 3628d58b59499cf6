"""How a language model's states become logits: what runs before the last layer, that layer, scale and soft-cap.

Known for a family by its record; of others the model's own forward is asked, with stand-ins for backbone and head, what
it makes of their outputs. Where that is something else, the forward as a whole gives the logits.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from recyclable.architectures.family import family_of
from recyclable.architectures.last_layer import narrow
from recyclable.architectures.prompted import is_prompted, prompted_head

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_STATES = torch.tensor([[[0.5, -1.25, 2.0], [-0.75, 0.25, 1.5]]], dtype=torch.float64)
_SMALL, _LARGE = 2.0**-30, 2.0**30
_LOGITS = torch.tensor([_SMALL, 0.25, -2.0, 11.0, -47.0, 600.0, _LARGE], dtype=torch.float64)
_TOLERANCE = 1e-5  # of models that compute in fp32 here
_OFFSET = "final_logits_bias"
"""How transformers calls what BART and its kin add to their logits."""


@dataclass(frozen=True)
class LanguageHead:
    """logits = cap(scale layer(transform(states))) of the body's states, where cap(z) = softcap tanh(z / softcap)."""

    body: nn.Module
    """Tokens in; states (`last_hidden_state`) or, where nothing better is known, `logits` out."""
    layer: nn.Module
    """The last one, which spreads states [..., H] over the vocabulary."""
    transform: Callable[[torch.Tensor], torch.Tensor] = field(default_factory=nn.Identity)
    scale: float = 1.0
    softcap: float | None = None
    offset: Callable[[], torch.Tensor | None] = field(default=lambda: None)
    """What is added to the layer's output [V]: BART's `final_logits_bias`, a buffer; None for most."""

    @property
    def is_linear(self) -> bool:
        """Whether the layer is states @ weight.T + bias: subclasses may do otherwise."""
        return type(self.layer) is nn.Linear

    @property
    def bias(self) -> torch.Tensor | None:
        """Of a linear layer, with the offset."""
        own: torch.Tensor | None = getattr(self.layer, "bias", None)
        offset = self.offset()
        if offset is None:
            return own
        return offset if own is None else own + offset

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """[..., V] of transformed states [..., H], by calling the layer."""
        logits, offset = self.layer(states), self.offset()
        return _scaled(logits if offset is None else logits + offset, self.scale, self.softcap)


class EncoderDecoder(nn.Module):
    """An encoder-decoder without its head: the encoder's states go into the decoder, under a mask of its own.

    No module of the model's: its encoder and decoder are called, not held.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.__dict__["_parts"] = model.get_encoder(), model.get_decoder()
        self.__dict__["_backbone"] = model.base_model

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        cross_attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        past_key_values: Any = None,
        output_hidden_states: bool = False,
    ) -> Any:
        """The decoder's output; its `hidden_states` where asked for.

        Args:
            input_ids: [B, L]; or their embeddings [B, L, H] as `inputs_embeds`.
            decoder_input_ids: [B, D]; None: as the backbone makes them of a text that it fills in (BART and its kin).
            attention_mask: which tokens of the encoder are real [B, L], or its additive mask [B, 1, L, L].
            decoder_attention_mask: the same of the decoder, [B, D] or [B, 1, D, D].
            cross_attention_mask: what the decoder's tokens see of the encoder's [B, 1, D, L]; None is `attention_mask`.
            past_key_values: what stands before the decoder's tokens.
        """
        encoder, decoder = self.__dict__["_parts"]
        if decoder_input_ids is None:
            alone = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
            return self.__dict__["_backbone"](**alone, output_hidden_states=output_hidden_states)
        read = encoder(
            input_ids=input_ids, inputs_embeds=inputs_embeds, attention_mask=attention_mask, return_dict=True
        )
        return decoder(
            input_ids=decoder_input_ids,
            attention_mask=decoder_attention_mask,
            encoder_hidden_states=read[0],
            encoder_attention_mask=attention_mask if cross_attention_mask is None else cross_attention_mask,
            past_key_values=past_key_values,
            output_hidden_states=output_hidden_states,
            use_cache=False,
            return_dict=True,
        )


def language_head(model: PreTrainedModel) -> LanguageHead:
    """The head of a language model of any kind, plain or with an adapter, whose last layer is narrowed."""
    narrow(model)
    if is_prompted(model):
        return prompted_head(model, language_head)
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    if known := family_of(model.config).masked_head:
        transform, layer = known(model)
        return LanguageHead(model.base_model, layer, transform)
    return _asked(model) or LanguageHead(model, nn.Identity())


def _scaled(logits: torch.Tensor, scale: float, softcap: float | None) -> torch.Tensor:
    logits = logits if scale == 1.0 else logits * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


class _Told(BaseModelOutputWithPastAndCrossAttentions):
    def __getattr__(self, name: str) -> None:
        """Whatever else a model takes from its backbone's output."""
        if name.startswith("__"):
            raise AttributeError(name)


class _Body(nn.Module):
    """Gives known states, by itself or by any of its modules; what else it is asked for is the backbone's."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.__dict__["_backbone"] = backbone  # not as a module

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.__dict__["_backbone"], name)
        return self if isinstance(found, nn.Module) else found

    def forward(self, *_: object, **__: object) -> _Told:
        return _Told(last_hidden_state=_STATES)


class _Last(nn.Module):
    """Gives known logits, and remembers what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(_STATES.clone())  # of whose dtype and device models make the states
        self.given: list[torch.Tensor] = []

    def forward(self, *given: torch.Tensor) -> torch.Tensor:
        self.given += given
        return _LOGITS.expand(*_STATES.shape[:2], -1)


def _asked(model: PreTrainedModel) -> LanguageHead | None:
    """The head where it is the one module beside the backbone that the forward calls, else None."""
    last, two = model.get_output_embeddings(), model.config.is_encoder_decoder
    body = EncoderDecoder(model) if two else model.base_model
    name = next((name for name, child in model.named_children() if any(m is last for m in child.modules())), None)
    if body is model or name is None or model.get_submodule(name) is body:
        return None
    shell, layer, stand_in = copy.copy(model), model.get_submodule(name), _Last()
    shell._modules = {other: _Body(module) for other, module in model._modules.items()} | {name: stand_in}
    offset = getattr(model, _OFFSET, None)
    if offset is not None:
        shell._buffers = {**model._buffers, _OFFSET: torch.zeros(1)}
    ids = torch.zeros(_STATES.shape[:2], dtype=torch.long)
    try:
        with torch.no_grad():
            told = type(model).forward(shell, input_ids=ids, **({"decoder_input_ids": ids} if two else {})).logits
        (given,) = stand_in.given
        before = _rounded(given.flatten()[0] / _STATES.flatten()[0])  # MiniCPM and T5 scale the states
        scale, most = _rounded(told[0, 0, 0] / _SMALL), _rounded(told[0, 0, -1])
    except Exception:  # whatever a forward makes of stand-ins
        return None
    softcap = None if math.isclose(most, scale * _LARGE, rel_tol=_TOLERANCE) else most
    if before != 1.0 and not (offset is None and type(layer) is nn.Linear and layer.bias is None):
        return None  # scaled states are scaled logits only where nothing is added to them
    if not (_close(given, before * _STATES) and _close(told, _scaled(stand_in(), scale, softcap))):
        return None
    added = (lambda: None) if offset is None else (lambda: getattr(model, _OFFSET).flatten())  # wherever it is by then
    return LanguageHead(body, layer, scale=before * scale, softcap=softcap, offset=added)


def _rounded(number: torch.Tensor) -> float:
    """To twelve digits: what a config says, without the rounding of the computation."""
    return float(f"{float(number):.12g}")


def _close(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    return found.shape == wanted.shape and torch.allclose(found.double(), wanted, rtol=_TOLERANCE, atol=0)
