"""Encoders: images to features."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils import convert_conv2d_weight_memory_format
from torchvision.models.resnet import BasicBlock, conv1x1, conv3x3

from fastcl.checks import check_choice

# 6n + 2 layers, n blocks in each of three stages: He et al. 2015, section 4.2
_BLOCKS_PER_STAGE = {"resnet8": 1, "resnet14": 2, "resnet20": 3}


def small_resnet(arch: str, width: int, in_channels: int) -> tuple[nn.Module, int]:
    """A residual network for small images: 3x3 stem, no pooling before the last layer.

    Args:
        arch: 'resnet8', 'resnet14' or 'resnet20'.
        width: channels of the first stage; each later stage halves the resolution and doubles them.
        in_channels: channels of the images.

    Returns:
        The encoder, images (N, in_channels, H, W) to features (N, F), and F.

    Raises:
        ValueError: an unknown ``arch``.
    """
    check_choice("arch", arch, tuple(_BLOCKS_PER_STAGE))
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
    convert_conv2d_weight_memory_format(encoder, torch.channels_last)
    return encoder, channels


def _block(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    shortcut = None
    if stride != 1 or in_channels != out_channels:
        shortcut = nn.Sequential(conv1x1(in_channels, out_channels, stride), nn.BatchNorm2d(out_channels))
    block: nn.Module = BasicBlock(in_channels, out_channels, stride, shortcut)
    return block
