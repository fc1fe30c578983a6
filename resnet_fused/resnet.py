"""ResNet-18 for small images, built of either block."""

from collections.abc import Callable

from torch import nn

from .blocks import FusedResidual
from .fusing import fuse


def _stage(block, input_channels, num_channels, first=False):
    """Two blocks; the first of each stage but the first halves the size and changes the channels."""
    if first:
        return nn.Sequential(block(input_channels, num_channels), block(num_channels, num_channels))
    return nn.Sequential(
        block(input_channels, num_channels, use_1x1conv=True, strides=2), block(num_channels, num_channels)
    )


def resnet18(
    in_channels: int = 1, num_classes: int = 10, block: Callable[..., nn.Module] = FusedResidual
) -> nn.Sequential:
    """ResNet-18 of ``block``, :class:`FusedResidual` or :class:`Residual`; the ``state_dict`` is the same.

    Shape: (N, in_channels, H, W) -> (N, num_classes), for H, W of about 32 and more (96 in the benchmarks).

    Source: https://arxiv.org/abs/1512.03385, in the form of "Dive into Deep Learning", section 8.6.
    """
    b1 = nn.Sequential(
        nn.Conv2d(in_channels, 64, kernel_size=7, stride=2, padding=3),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.MaxPool2d(kernel_size=3, stride=2, padding=1),
    )
    if block is FusedResidual:
        fuse(b1)
    return nn.Sequential(
        b1,
        _stage(block, 64, 64, first=True),
        _stage(block, 64, 128),
        _stage(block, 128, 256),
        _stage(block, 256, 512),
        nn.AdaptiveAvgPool2d((1, 1)),
        nn.Flatten(),
        nn.Linear(512, num_classes),
    )
