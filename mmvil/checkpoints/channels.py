# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Weights of RGB images to images of other channels."""

import torch
from torch import Tensor


def adapt_input_channels(weight: Tensor, in_channels: int) -> Tensor:
    """Adapt the weight of an RGB model's patch embedding to images of other channels.

    One channel gets the sum over red, green and blue, so that a gray image gives what its RGB copy
    gives. More channels get the three in turn, scaled by ``3 / in_channels`` to keep the size of
    the sum. The rule is that of ``timm.models._manipulate.adapt_input_conv``.

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
            f'The checkpoint is of images of {given} channels, the model has '
            f'in_channels={in_channels}: only weights of RGB images, 3 channels, can be adapted. '
            f'Choose such a checkpoint, or in_channels={given}.'
        )
    precise = weight.to(torch.promote_types(weight.dtype, torch.float32))
    if in_channels == 1:
        adapted = precise.sum(dim=1, keepdim=True)
    else:
        cyclic = torch.arange(in_channels, device=weight.device) % 3
        adapted = precise[:, cyclic] * (3 / in_channels)
    return adapted.to(weight.dtype)
