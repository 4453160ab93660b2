"""Encoders: images to features."""

from __future__ import annotations

from typing import Any

import torch
import torchvision
from timm import create_model
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.nn.utils import convert_conv2d_weight_memory_format
from torchvision.models.resnet import BasicBlock, conv1x1, conv3x3

from fastcl.similarity.checks import check_choice

VITS = {"vit_small": "vit_small_patch16_224", "vit_base": "vit_base_patch16_224"}
TINY_VIT = "vit_tiny"

RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "wide_resnet50_2")
SMALL_IMAGE = 64  # the largest side of images that get the stem of CIFAR's networks

_NARROWEST_CHANNELS_LAST = 16  # channels of the first stage

# 6n + 2 layers, n blocks in each of three stages: He et al. 2015, section 4.2
_BLOCKS_PER_STAGE = {"resnet8": 1, "resnet14": 2, "resnet20": 3}


def make_encoder(
    arch: str, image_size: int, *, width: int = 32, in_channels: int = 3
) -> tuple[nn.Module, int]:
    """An untrained encoder for square images.

    Args:
        arch: one of torchvision's ResNets (:data:`RESNETS`), without its classifier; 'resnet8', 'resnet14'
            or 'resnet20', He et al.'s networks for CIFAR-10; timm's 'vit_small' or 'vit_base' with patches of
            16 pixels, or 'vit_tiny', 4 layers on 8x8 patches of the image, all of their class token.
        image_size: side of the images; up to 64, torchvision's ResNets get a 3x3 stem of stride 1 without
            pooling, as usual on CIFAR.
        width: channels of the first stage of the small ResNets; 'vit_tiny' is 4 times as wide.
        in_channels: channels of the images; torchvision's ResNets take 3 only.

    Returns:
        The encoder, images (N, in_channels, H, W) to features (N, F), and F.

    Raises:
        ValueError: an unknown ``arch``, or one that does not take ``in_channels``.
    """
    check_choice("arch", arch, (*_BLOCKS_PER_STAGE, *RESNETS, TINY_VIT, *VITS))
    if arch in (TINY_VIT, *VITS):
        return _vision_transformer(arch, image_size, width, in_channels)
    if arch in _BLOCKS_PER_STAGE:
        encoder, features = _small_resnet(arch, width, in_channels)
    elif in_channels == 3:
        encoder, features = _torchvision_resnet(arch, small=image_size <= SMALL_IMAGE)
    else:
        small = ", ".join(map(repr, _BLOCKS_PER_STAGE))
        raise ValueError(
            f"arch must be one of {small} or a vit for images of {in_channels} channel(s), got {arch!r}"
        )
    # PyTorch 2.13's CPU convolutions corrupt memory in the backward pass of narrower channels-last networks
    if features >= 4 * _NARROWEST_CHANNELS_LAST:
        convert_conv2d_weight_memory_format(encoder, torch.channels_last)
    return encoder, features


def _vision_transformer(arch: str, size: int, width: int, in_channels: int) -> tuple[nn.Module, int]:
    patch = max(1, size // 8) if arch == TINY_VIT else 16
    if size % patch != 0:
        raise ValueError(f"image_size must be a multiple of {patch} for {arch}, got {size}")
    # small crops have fewer patches, whose positions are then interpolated
    options: dict[str, Any] = {"img_size": size, "in_chans": in_channels, "num_classes": 0}
    options |= {"dynamic_img_size": True, "dynamic_img_pad": True}
    vit: Any
    if arch == TINY_VIT:
        vit = VisionTransformer(patch_size=patch, embed_dim=4 * width, depth=4, num_heads=4, **options)
    else:
        vit = create_model(VITS[arch], **options)
    return vit, vit.num_features


def _torchvision_resnet(arch: str, *, small: bool) -> tuple[nn.Module, int]:
    encoder = torchvision.models.get_model(arch)
    features = encoder.fc.in_features
    encoder.fc = nn.Identity()
    if small:
        encoder.conv1 = conv3x3(3, encoder.conv1.out_channels)
        nn.init.kaiming_normal_(encoder.conv1.weight, mode="fan_out", nonlinearity="relu")
        encoder.maxpool = nn.Identity()
    return encoder, features


def _small_resnet(arch: str, width: int, in_channels: int) -> tuple[nn.Module, int]:
    """A residual network for small images: 3x3 stem; each stage after the first halves the resolution."""
    layers: list[nn.Module] = [conv3x3(in_channels, width), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
    channels = width
    for stage in range(3):
        for block in range(_BLOCKS_PER_STAGE[arch]):
            stride = 2 if stage > 0 and block == 0 else 1
            layers.append(_block(channels, width * 2**stage, stride))
            channels = width * 2**stage
    encoder = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    for module in encoder.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return encoder, channels


def _block(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    shortcut = None
    if stride != 1 or in_channels != out_channels:
        shortcut = nn.Sequential(conv1x1(in_channels, out_channels, stride), nn.BatchNorm2d(out_channels))
    block: nn.Module = BasicBlock(in_channels, out_channels, stride, shortcut)
    return block
