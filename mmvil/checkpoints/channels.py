# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Adapt RGB weights to other numbers of input channels."""

from collections.abc import Mapping

import torch
from torch import Tensor

PATCH_EMBED_WEIGHT = 'patch_embed.projection.weight'


def adapt_input_channels(weight: Tensor, in_channels: int) -> Tensor:
    """Adapt the weight of an RGB model's patch embedding to another number of input channels.

    A single channel gets the sum over red, green and blue, so that a gray image yields the same
    output as its RGB copy. More channels repeat the three in turn, scaled by ``3 / in_channels`` to
    preserve the magnitude of the sum, as in ``timm.models._manipulate.adapt_input_conv``.

    Args:
        weight (Tensor): Shape (D, C, P, P).
        in_channels (int): Channels of the images.

    Returns:
        Tensor: Shape (D, in_channels, P, P); ``weight`` itself where C is ``in_channels``.

    Raises:
        ValueError: If C is neither ``in_channels`` nor 3.
    """
    given = weight.shape[1]
    if given == in_channels:
        return weight
    if given != 3:
        raise ValueError(
            f'The checkpoint has {given} input channels, but the model has '
            f'in_channels={in_channels}: only RGB weights (3 channels) can be adapted. '
            f'Choose such a checkpoint, or in_channels={given}.'
        )
    precise = weight.to(torch.promote_types(weight.dtype, torch.float32))
    if in_channels == 1:
        adapted = precise.sum(dim=1, keepdim=True)
    else:
        cyclic = torch.arange(in_channels, device=weight.device) % 3
        adapted = precise[:, cyclic] * (3 / in_channels)
    return adapted.to(weight.dtype)


def input_channels(state_dict: Mapping[str, Tensor], prefix: str = '') -> int | None:
    """Input channels of a backbone's weights, or None if there is no patch embedding."""
    weight = state_dict.get(prefix + PATCH_EMBED_WEIGHT)
    return weight.shape[1] if weight is not None and weight.dim() == 4 else None
