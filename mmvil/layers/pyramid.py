# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Feature pyramid from feature maps of a single stride."""

import math
from collections.abc import Callable, Sequence

from torch import Tensor, nn


class FeaturePyramid(nn.Module):
    """Rescale each map of a plain backbone to its own stride (as in BEiT and the ADE20K recipe), or
    a single map to several strides (the simple feature pyramid of ViTDet).

    Maps are upsampled by one transposed convolution per doubling, with norm and GELU in between,
    and downsampled by max pooling. Odd sizes are rounded up, as in convolutional backbones.

    Args:
        channels (int): D, width of all input maps.
        scales (Sequence[float]): Scale of each output map, a power of two such as 4, 2, 1 or 0.5.
        out_channels (Sequence[int | None], optional): Width of each output map after a 1x1
            convolution; None adds no convolution. Default: None.
        norm_layer (Callable): Builds the norm from a number of channels. Default:
            ``nn.BatchNorm2d``.
    """

    def __init__(
        self,
        channels: int,
        scales: Sequence[float],
        out_channels: Sequence[int | None] | None = None,
        norm_layer: Callable[[int], nn.Module] = nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        self.levels = nn.ModuleList()
        for level, scale in enumerate(scales):
            octave = math.log2(scale)
            if octave != int(octave):
                raise ValueError(
                    f'Feature maps can only be rescaled by powers of two, but got {scale:g}.'
                )
            layers: list[nn.Module] = []
            for step in range(int(octave)):
                if step:
                    layers += [norm_layer(channels), nn.GELU()]
                layers.append(nn.ConvTranspose2d(channels, channels, kernel_size=2, stride=2))
            if octave < 0:
                layers.append(nn.MaxPool2d(kernel_size=2 ** int(-octave), ceil_mode=True))
            if out_channels is not None and out_channels[level] is not None:
                layers.append(nn.Conv2d(channels, out_channels[level], kernel_size=1))
            self.levels.append(nn.Sequential(*layers))

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Rescale maps (B, D, h, w), one per level, or one for all levels."""
        maps = maps if len(maps) > 1 else [*maps] * len(self.levels)
        return [level(x) for level, x in zip(self.levels, maps)]
