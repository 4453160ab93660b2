"""Hugging Face's CLIPModel and SiglipModel with their losses computed by fastcl."""

from __future__ import annotations

import inspect
from functools import wraps
from typing import Any, TypeVar

from torch import Tensor, nn

from fastcl.integrations._peer import in_dtype_of, peer
from fastcl.integrations.vision import ensure_torchvision
from fastcl.losses.clip import clip_loss
from fastcl.losses.siglip import siglip_loss

with peer("transformers>=5.2,<6"):
    ensure_torchvision()
    from transformers.models.clip import modeling_clip as clip
    from transformers.models.siglip import modeling_siglip as siglip

Model = TypeVar("Model", bound=nn.Module)


def use_fastcl(model: Model) -> Model:
    """Let ``model(..., return_loss=True)`` compute its loss by fastcl; all else stays, also what is saved.

    The logits (N, N) are an output of these models and are still made; what goes is the softmax over them
    and all that its backward pass keeps. Once more does nothing.

    Args:
        model: a ``CLIPModel`` or a ``SiglipModel`` of transformers; changed in place.

    Returns:
        The model.

    Raises:
        TypeError: any other model, a subclass included, whose loss may be another.
    """
    fused = {clip.CLIPModel: CLIPModel, siglip.SiglipModel: SiglipModel}
    if type(model) not in (*fused, *fused.values()):
        kind = f"{type(model).__module__}.{type(model).__qualname__}"
        raise TypeError(f"use_fastcl takes transformers' CLIPModel or SiglipModel, got {kind}")
    model.__class__ = fused.get(type(model), type(model))  # type: ignore[assignment]
    return model


def _fused(original: Any, loss_of: Any) -> Any:
    """The ``original`` forward, but the loss is ``loss_of(model, text_embeds, image_embeds)``."""
    signature = inspect.signature(original)

    @wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return_dict = kwargs.pop("return_dict", None)
        call = signature.bind(self, *args, **kwargs)
        return_loss = call.arguments.pop("return_loss", None)
        outputs = original(*call.args, **call.kwargs, return_dict=True)
        if return_loss:
            text = outputs.text_embeds
            loss = loss_of(self, text, outputs.image_embeds.to(text.device))
            outputs = type(outputs)(loss=loss, **outputs)
        return (
            outputs
            if (self.config.return_dict if return_dict is None else return_dict)
            else outputs.to_tuple()
        )

    return forward


def _clip(model: Any, text: Tensor, image: Tensor) -> Tensor:
    return in_dtype_of(text, clip_loss(image, text, model.logit_scale.exp(), normalize=False))


def _siglip(model: Any, text: Tensor, image: Tensor) -> Tensor:
    return siglip_loss(text, image, model.logit_scale.exp(), model.logit_bias, normalize=False)


class CLIPModel(clip.CLIPModel):
    """What :func:`use_fastcl` makes of ``transformers.CLIPModel``."""

    forward = _fused(clip.CLIPModel.forward, _clip)


class SiglipModel(siglip.SiglipModel):
    """What :func:`use_fastcl` makes of ``transformers.SiglipModel``."""

    forward = _fused(siglip.SiglipModel.forward, _siglip)
